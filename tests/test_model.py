"""Loading, and the one list of a model's parts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ctp.model import (
    block_linears,
    context_length,
    decoder_blocks,
    embedding_width,
    load_model,
    sequential_groups,
    vocabulary_size,
)
from ctp_kernels import CTPError, PackedLinear, patch_model
from ctp_kernels.checkpoints import save_packed
from tests.helpers import MODELS, SMALL, STORIES, needs_shared, small_model

LLAMA = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
         ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip
OPT = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]]


@pytest.mark.parametrize("name", MODELS)
def test_one_list_of_parts(name: str) -> None:
    model = small_model(name)
    blocks = decoder_blocks(model)
    assert [n for n, _ in blocks] == [n for n, m in model.named_modules() if m in [b for _, b in blocks]]
    for block_name, block in blocks:
        assert sequential_groups(block) == (OPT if "opt" in name else LLAMA)
        for part, linear in block_linears(block).items():
            assert model.get_submodule(f"{block_name}.{part}") is linear
    width = 32 if name == "opt-350m-like" else 64
    assert embedding_width(model) == width == model.get_input_embeddings()(torch.zeros(1, dtype=torch.long)).shape[-1]
    assert (context_length(model), vocabulary_size(model)) == (128, 96)


def test_parts_of_a_packed_model_are_the_same() -> None:
    model = small_model("llama-gqa-tied")
    names = list(block_linears(decoder_blocks(model)[0][1]))
    patch_model(model, format="int4")
    linears = block_linears(decoder_blocks(model)[0][1])
    assert list(linears) == names and all(isinstance(m, PackedLinear) for m in linears.values())


def test_another_architecture_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    with pytest.raises(CTPError, match="neither a LLaMA-shaped nor an OPT-shaped"):
        decoder_blocks(model)


def test_foreign_linear_in_a_block_is_refused() -> None:
    model = small_model("llama-gqa-tied")
    decoder_blocks(model)[0][1].add_module("router", torch.nn.Linear(64, 4))
    with pytest.raises(CTPError, match="'router'"):
        decoder_blocks(model)


@pytest.mark.parametrize("name", ["Gemma", "Gemma2", "Gemma3Text"])
def test_scaled_embeddings_are_refused(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")(**SMALL, num_key_value_heads=2, intermediate_size=88, head_dim=16)
    getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).save_pretrained(tmp_path)
    with pytest.raises(CTPError, match="scales its word embeddings"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "one/two/three"])
def test_missing_folder(path: str) -> None:
    with pytest.raises(CTPError, match="is not a folder"):
        load_model(path)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CTPError, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CTPError):
        load_model(str(tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model folder in fp16: a small random model with the tokenizer of the real one."""
    target = tmp_path / "model"
    small_model("llama-gqa-tied").half().save_pretrained(target)
    for file in STORIES.glob("tokenizer*"):
        shutil.copyfile(file, target / file.name)
    return target


@needs_shared
def test_half_checkpoint_is_widened_on_the_cpu_and_frozen(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert tokenizer("Once").input_ids
    model, _ = load_model(str(folder), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@needs_shared
def test_packed_folder_keeps_its_bytes(folder: Path, tmp_path: Path) -> None:
    model = small_model("llama-gqa-tied").half()
    patch_model(model, format="unstructured")
    save_packed(model, tmp_path / "packed", tokenizer=AutoTokenizer.from_pretrained(folder))
    loaded, _ = load_model(str(tmp_path / "packed"))
    layers = {name: m for name, m in loaded.named_modules() if isinstance(m, PackedLinear)}
    assert layers
    for name, layer in layers.items():
        for buffer, tensor in model.get_submodule(name).packed.buffers.items():
            assert torch.equal(layer.packed.buffers[buffer], tensor)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.isfinite(loaded(torch.tensor([[1, 2, 3]])).logits).all()


@needs_shared
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "half of the weights", "no tokenizer"])
def test_damaged_folder(folder: Path, damage: str) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "overwritten":
        weights.write_bytes(b"\xff" * len(data))
    elif damage == "half of the weights":
        model = small_model("llama-gqa-tied")
        state = {n: t.contiguous() for n, t in model.state_dict().items() if "layers.1" not in n}
        model.save_pretrained(folder, state_dict=state)
    else:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    with pytest.raises(CTPError) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


@needs_shared
def test_other_architecture_on_disk(folder: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)).save_pretrained(folder)
    with pytest.raises(CTPError, match="neither a LLaMA-shaped nor an OPT-shaped"):
        load_model(str(folder))
