"""Whole decoding steps in one graph: torch.compile with a static cache, on the CPU and on a GPU, and CUDA graphs."""

import pytest
import torch
from transformers import StaticCache

from ctp_kernels import patch_model
from tests.helpers import small_model

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
FORMATS = ["int4", "sparse24-int3", "unstructured-int4"]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def packed_model(format: str, device: str, fuse: bool) -> torch.nn.Module:
    model = small_model("llama-gqa-tied").to(device, torch.float32 if device == "cpu" else torch.float16)
    return patch_model(model, format, fuse=fuse)


def decode(step, model, steps: int = 5) -> torch.Tensor:
    """Greedy tokens (2, steps) of `step`, called as the model is, with a static cache."""
    device = model.device
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids, at, found = IDS.to(device), torch.arange(IDS.shape[1], device=device), []
    with torch.no_grad():
        for _ in range(steps):
            logits = step(input_ids=ids, past_key_values=cache, cache_position=at, use_cache=True).logits
            ids, at = logits[:, -1:].argmax(-1), at[-1:] + 1
            found.append(ids.clone())
    return torch.cat(found, 1).cpu()


@pytest.mark.parametrize("fuse", [False, True], ids=["alone", "fused"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_without_a_break_gives_the_eager_tokens(device, format, fuse):
    model = packed_model(format, device, fuse)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    assert torch.equal(decode(compiled, model), decode(model, model))
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("format", FORMATS)
def test_a_captured_cuda_graph_gives_the_eager_bits(format, rows):
    """Kernels allocate through PyTorch's pool only and never synchronise: a graph captures them, backward too."""
    block = packed_model(format, "cuda", True).model.layers[0].mlp
    x = torch.randn(rows, 64, device="cuda", dtype=torch.float16, requires_grad=True)

    def step() -> torch.Tensor:
        y = block(x)
        (dx,) = torch.autograd.grad(y.float().square().sum(), x)
        return torch.cat([y, dx])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, step())
