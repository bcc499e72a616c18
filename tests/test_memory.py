"""Packed weights in huge pages: the same numbers, in memory of their own."""

import gc
import io
import mmap

import pytest
import torch

from ctp_kernels import memory, pack, patch_model
from ctp_kernels.linear import PackedLinear

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")


def test_copies_hold_the_same_and_live_on_without_the_originals():
    first = {"a": torch.arange(1000, dtype=torch.int32), "b": torch.randn(33, 7), "none": None, "empty": torch.empty(0)}
    wide = {"c": torch.randint(0, 255, (70 * 2**20,), dtype=torch.uint8)}  # more than a block
    expected = {name: tensor.clone() for name, tensor in (first | wide).items() if tensor is not None}
    before = {name: tensor.data_ptr() for name, tensor in (first | wide).items() if tensor is not None}
    memory.in_huge_pages([first, wide])
    gc.collect()
    held = first | wide
    assert held["none"] is None
    for name, tensor in expected.items():
        assert torch.equal(held[name], tensor) and held[name].shape == tensor.shape
        assert name == "empty" or (held[name].data_ptr() != before[name] and held[name].data_ptr() % 64 == 0)
    assert held["a"].data_ptr() % (2 * 2**20) == 0  # or the first page would be of small ones


def test_tensors_share_pages_but_no_storage():
    layers = [{"codes": torch.full((1000,), i, dtype=torch.uint8)} for i in range(3)]
    memory.in_huge_pages(layers)
    addresses = [layer["codes"].data_ptr() for layer in layers]
    assert addresses == [addresses[0] + 1024 * i for i in range(3)]
    saved = io.BytesIO()
    torch.save(layers[1], saved)
    assert len(saved.getvalue()) < 4096
    layers[1]["codes"].fill_(9)
    assert (layers[0]["codes"] == 0).all() and (layers[2]["codes"] == 2).all()


def test_a_system_without_huge_pages_goes_on(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    buffers = {"a": torch.arange(10)}
    monkeypatch.setattr(mmap, "mmap", Refusing)
    memory.in_huge_pages([buffers])
    assert torch.equal(buffers["a"], torch.arange(10))
    kept = buffers["a"]
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    memory.in_huge_pages([buffers])
    assert buffers["a"] is kept


def test_patched_layers_lie_together():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 16))
    alone = [PackedLinear(pack(layer.weight, "int4"), layer.bias) for layer in model]
    patch_model(model, format="int4")
    x = torch.randn(3, 64)
    assert torch.equal(model(x), alone[1](alone[0](x)))
    addresses = sorted(buffer.data_ptr() for buffer in model.buffers())
    assert addresses[-1] - addresses[0] < 2 * 2**20
