"""From checkpoint to packed folder: what is stored in which dtype, and that it comes back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ctp.compress import solver, walk
from ctp.data import token_windows
from ctp.evaluate import perplexity
from ctp.jobs import compress_to_folder
from ctp.model import load_model
from ctp_kernels import PackedLinear, unpatch_model
from ctp_kernels.checkpoints import read_manifest
from ctp_kernels.errors import CTPError

from .helpers import small_model
from .text import character_tokenizer

NO_TEXT = {"int4-g24": "rtn"}  # the methods that need no calibration; magnitude for what prunes


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i} of a text, {i * i} letters or so\n" for i in range(400)))
    return str(path)


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a small model, rounded to bf16, as a folder in `dtype` whose config names the dtype `says`."""

    def make(dtype: torch.dtype, says: str | None = "", change=lambda model: None) -> str:
        folder = tmp_path / f"dense-{dtype}-{says}".replace("torch.", "")
        model: Any = small_model("llama-gqa-tied").bfloat16().to(dtype)
        change(model)
        model.save_pretrained(folder)
        character_tokenizer().save_pretrained(folder)
        if says != "":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "dtype": says}))
        return str(folder)

    return make


@pytest.mark.parametrize("format", ["int4-g24", "sparse24", "unstructured", "sparse24-fp32"])
@pytest.mark.parametrize(("dtype", "says"), [(torch.bfloat16, ""), (torch.float16, ""), (torch.bfloat16, None)])
def test_a_checkpoint_keeps_its_dtype(checkpoint, text, tmp_path, dtype, says, format):
    name, wide, packed = str(dtype).removeprefix("torch."), tmp_path / "wide", tmp_path / "packed"
    options = {"method": NO_TEXT.get(format, "magnitude"), "progress": False}
    wide_info = compress_to_folder(checkpoint(torch.float32), wide, format, **options)
    info = compress_to_folder(checkpoint(dtype, says), packed, format, **options)
    assert wide_info["bytes_dense"] == 2 * info["bytes_dense"]
    assert {layer["dtype"] for layer in read_manifest(packed)["layers"].values()} == {name}
    assert json.loads((packed / "config.json").read_text())["dtype"] == name
    for folder, wanted in ((packed, dtype), (wide, torch.float32)):
        tensors = load_file(folder / "ctp_model.safetensors")
        assert {t.dtype for n, t in tensors.items() if n.endswith(".weight")} == {wanted}
        values = {t.dtype for n, t in tensors.items() if n.endswith(".values")}
        assert values == {"int4-g24": set(), "sparse24-fp32": {torch.float32}}.get(format, {wanted})

    found = []
    for folder in (packed, wide):
        model, tokenizer = load_model(str(folder))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        windows = token_windows(text, tokenizer, 32, split="test", count=4)
        found.append(perplexity(model, windows).perplexity)
    # The weights fit into bf16 and fp16; sums may run in another order (with AMX, bf16 values take other kernels).
    assert math.isclose(*found, rel_tol=1e-6)


class Killed(BaseException):
    pass


def test_an_interrupted_run_on_a_bf16_checkpoint_gives_the_same_bytes(checkpoint, text, tmp_path, monkeypatch):
    options = {"calibration": text, "samples": 4, "length": 32, "progress": False}
    model, calls = checkpoint(torch.bfloat16), iter(range(100))
    compress_to_folder(model, tmp_path / "whole", "sparse24", **options)

    def dying(*arguments, **options):
        if next(calls) == 9:  # seven linears a block: in the second
            raise Killed
        return solver.solve(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(walk, "solve", dying)
        compress_to_folder(model, tmp_path / "cut", "sparse24", **options)
    compress_to_folder(model, tmp_path / "cut", "sparse24", **options)
    assert next(calls) == 10, "the first block was to be solved once"
    files = [(tmp_path / name / "ctp_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_what_fp16_cannot_hold_is_named(checkpoint, tmp_path):
    def scaled(part: str):
        return lambda model: model.get_submodule(part).weight.mul_(1e6)

    for part in ("model.embed_tokens", "model.layers.1.mlp.up_proj"):
        model = checkpoint(torch.float32, "float16", scaled(part))
        with pytest.raises(CTPError, match=rf"{part}.* has values that .* cannot hold: use b"):
            compress_to_folder(model, tmp_path / part, "sparse24", method="magnitude", progress=False)
        assert not (tmp_path / part).exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_packed_model_unpacks_to_the_dtype_it_was_loaded_in(checkpoint, tmp_path, dtype):
    compress_to_folder(checkpoint(torch.bfloat16), tmp_path / "packed", "int4", method="rtn", progress=False)
    model, _ = load_model(str(tmp_path / "packed"), dtype=dtype)
    assert {m.dtype for m in model.modules() if isinstance(m, PackedLinear)} == {dtype} == {model.config.dtype}
    ids = torch.arange(3, 20).unsqueeze(0)
    packed = model(ids).logits
    dense = unpatch_model(model)
    assert {p.dtype for p in dense.parameters()} == {dtype}
    torch.testing.assert_close(dense(ids).logits, packed, rtol=0.1, atol=0.1)
