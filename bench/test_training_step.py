"""One step of prompt training (forward, backward into the prompt) of a patched model, beside the dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.models import ALL, QUICK, Setup, Size, llama, on_each_device, random_ids, weight_bytes

CPU = Size("54M", 4, 1024, 2816, 8, 8)
LENGTH, PROMPT = 96, 32  # 128 rows a sequence in every layer
#: Sequences of a short run.
SHORT = {"cpu": [8], "cuda": [1, 8]}


def step(net: Any, prompt: torch.Tensor, ids: torch.Tensor) -> torch.Tensor | None:
    """The prompt's gradient."""
    prompt.grad = None
    words = net.get_input_embeddings()(ids)
    embeddings = torch.cat([prompt.to(words.dtype).expand(len(ids), -1, -1), words], dim=1)
    logits = net(inputs_embeds=embeddings, use_cache=False).logits[:, len(prompt) : -1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return prompt.grad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", [1, 8, 16])
@pytest.mark.parametrize("format", [*ALL, "bitsandbytes-fp4"])
@on_each_device(CPU)
def test_training_step(interleave, table, request, setup, format, batch):
    short = format in [*QUICK, "bitsandbytes-fp4"] and batch in SHORT[setup.device]
    if not short and not request.config.getoption("--benchmark-full"):
        pytest.skip("only with --benchmark-full")
    run(interleave, table, setup, format, batch)


def run(interleave, table, setup: Setup, format: str, batch: int) -> None:
    nets = {"dense": llama(setup, "dense"), "packed": llama(setup, format)}
    generator = torch.Generator().manual_seed(1)
    prompt = (torch.randn(PROMPT, setup.size.hidden, generator=generator) * 0.02).to(setup.device).requires_grad_()
    ids = random_ids(setup, batch, LENGTH)
    gradient = step(nets["packed"], prompt, ids)
    assert gradient is not None and gradient.abs().max() > 0
    peaks = {}
    if setup.device == "cuda":  # what a step takes on top of the weights of both models
        for name, net in nets.items():
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(net, prompt, ids)
            peaks[f"step_bytes_{name}"] = torch.cuda.max_memory_allocated() - held
    calls = {name: [lambda net=net: step(net, prompt, ids)] for name, net in nets.items()}
    times = interleave(calls, device=setup.device, seconds=6 if setup.device == "cpu" else 2, least=5)
    dense, packed = (times[name]["median"] for name in nets)
    table.add(setup.device, "training_step", {
        "model": setup.size.name, "format": format, "rows": batch * (LENGTH + PROMPT), "dense_ms": dense * 1e3,
        "packed_ms": packed * 1e3, "speedup": dense / packed, "weight_bytes_dense": weight_bytes(nets["dense"]),
        "weight_bytes_packed": weight_bytes(nets["packed"]), **peaks,
    })  # fmt: skip
