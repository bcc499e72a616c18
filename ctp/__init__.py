"""Compress a language model, then give back its quality with a trained prompt. Runs on `ctp_kernels`."""
