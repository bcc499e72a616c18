"""The embedded models and text, and the main job run on them."""
