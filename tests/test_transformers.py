"""Packed folders through transformers' own from_pretrained and save_pretrained, with the plug-in and without it."""

import copy
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from ctp_kernels import CTPError, PackedLinear, patch_model, unpatch_model
from ctp_kernels.checkpoints import MANIFEST, cast_model, export_model, is_packed, load_packed, save_packed
from ctp_kernels.checkpoints.manifest import OWN_WEIGHTS
from ctp_kernels.checkpoints.transformers_plugin import PackedConfig
from tests.helpers import small_model

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
LLAMA = "llama-gqa-tied"


def packed_folder(folder: Path, format: str = "int4", name: str = LLAMA, **options) -> Path:
    model = small_model(name)
    if format.startswith("unstructured"):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight * (module.weight.abs() > 0.1)
    save_packed(patch_model(model, format, **options), folder)
    return folder


def load(folder: Path | str, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    """The same tensors, ties and logits, bit for bit."""
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    formats = [{n: (m.format, m.dtype) for n, m in x.named_modules() if isinstance(m, PackedLinear)}
               for x in (model, expected)]  # fmt: skip
    assert formats[0] == formats[1] and formats[0]
    assert len(list(model.parameters())) == len(list(expected.parameters()))
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


FORMATS = ["int4", "int3-g32-asym", "sparse24-int4", "sparse24-fp16", "unstructured", "unstructured-int3-g32-asym"]


@pytest.mark.parametrize("name", [LLAMA, "llama-biases", "opt", "opt-350m-like"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_model_is_that_of_load_packed(tmp_path, name: str, format: str) -> None:
    folder = packed_folder(tmp_path / "packed", format, name)
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values())
    assert_same(model, load_packed(folder))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not hasattr(model.config, "transformers_weights")
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_orders_of_inputs_and_a_packed_head(tmp_path) -> None:
    model = patch_model(small_model(LLAMA), "int4-g32", skip=())
    layer = model.model.layers[1].mlp.up_proj
    layer.input_order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).int()
    assert model.config.tie_word_embeddings
    save_packed(model, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    assert isinstance(loaded.lm_head, PackedLinear)
    assert_same(loaded, load_packed(tmp_path / "packed"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
@pytest.mark.parametrize("dtype", ["auto", torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", ["int4", "unstructured-fp16"])
def test_the_dtype_is_that_of_activations(tmp_path, format: str, dtype, device_map: str) -> None:
    """Packed bytes stay as they are stored, scales and floating values too."""
    model = small_model(LLAMA)
    for parameter in model.parameters():
        parameter.data = parameter.half()
    save_packed(patch_model(model, format), tmp_path / "packed")
    expected = load_packed(tmp_path / "packed")
    assert expected.dtype == torch.float16
    if dtype != "auto":
        cast_model(expected, dtype)
    loaded = load(tmp_path / "packed", dtype=dtype, device_map=device_map)
    assert loaded.config.dtype == expected.dtype
    assert_same(loaded, expected)


def test_generate(tmp_path) -> None:
    folder = packed_folder(tmp_path / "packed")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(load(folder).generate(IDS, **options), load_packed(folder).generate(IDS, **options))


def rewrite(folder: Path, change) -> None:
    """A folder that its maker got wrong: `change` gets the tensors and the config, and the manifest fits the result."""
    tensors, config = load_file(folder / OWN_WEIGHTS), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / OWN_WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in (OWN_WEIGHTS, "config.json"):
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


Q, NORM = "model.layers.0.self_attn.q_proj", "model.norm.weight"
DAMAGE = {
    "altered": (lambda f: flip(f / OWN_WEIGHTS), "was altered"),
    "altered-config": (lambda f: (f / "config.json").write_text((f / "config.json").read_text() + " "), "altered"),
    "no-weights": (lambda f: (f / OWN_WEIGHTS).unlink(), "lacks the file"),
    "no-manifest": (lambda f: (f / MANIFEST).unlink(), "no ctp_manifest.json"),
    "no-codes": (lambda f: rewrite(f, lambda t, c: t.pop(f"{Q}.codes")), "lacks the tensors"),
    "short-codes": (lambda f: rewrite(f, lambda t, c: t.update({f"{Q}.codes": t[f"{Q}.codes"][:-1].clone()})), Q),
    "no-norm": (lambda f: rewrite(f, lambda t, c: t.pop(NORM)), r"missing \['model.norm.weight'\]"),
    "norm-shape": (lambda f: rewrite(f, lambda t, c: t.update({NORM: torch.ones(3)})), "do not hold this model"),
    "norm-nan": (lambda f: rewrite(f, lambda t, c: t[NORM].fill_(float("nan"))), "NaN"),
    "unknown": (lambda f: rewrite(f, lambda t, c: t.update({"model.x": torch.ones(3)})), r"unknown \['model.x'\]"),
    "more-layers": (lambda f: rewrite(f, lambda t, c: c.update(num_hidden_layers=3)), "missing"),
    "fewer-layers": (lambda f: rewrite(f, lambda t, c: c.update(num_hidden_layers=1)), "does not have"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_one_sentence(tmp_path, case: str) -> None:
    damage, told = DAMAGE[case]
    damage(packed_folder(tmp_path / "packed"))
    with pytest.raises(CTPError, match=told) as error:
        load(tmp_path / "packed", ignore_mismatched_sizes=True)
    assert "\n" not in str(error.value)


def test_requests_that_make_no_sense(tmp_path) -> None:
    folder = packed_folder(tmp_path / "packed")
    with pytest.raises(CTPError, match="does not have"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(CTPError, match="state_dict"):
        LlamaForCausalLM.from_pretrained(None, config=AutoConfig.from_pretrained(folder), state_dict={})
    small_model(LLAMA).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="pre-quantized"):
        load(tmp_path / "dense", quantization_config=PackedConfig())


def test_without_the_plug_in_nothing_is_loaded(tmp_path) -> None:
    """And ctp_kernels alone does not import transformers."""
    folder = packed_folder(tmp_path / "packed")
    code = f"""
import sys
import ctp_kernels
assert "transformers" not in sys.modules
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for auto in (AutoModelForCausalLM, LlamaForCausalLM):
    try:
        auto.from_pretrained({str(folder)!r})
    except OSError as error:
        assert "no file named model.safetensors" in str(error), error
    else:
        raise AssertionError("a model of random layers")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "got ctp_kernels" in done.stderr


def test_folders_of_the_old_name_are_still_read(tmp_path) -> None:
    folder = packed_folder(tmp_path / "packed")
    expected = load_packed(folder)
    rewrite(folder, lambda t, c: c.pop("quantization_config"))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["model.safetensors"] = manifest["files"].pop(OWN_WEIGHTS)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / OWN_WEIGHTS).rename(folder / "model.safetensors")
    assert_same(load_packed(folder), expected)


def test_a_folder_of_the_hub(tmp_path, monkeypatch) -> None:
    """Also the files that transformers does not fetch, of the revision that it took, to where it put the others."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789" * 4
    home = tmp_path / "models--someone--packed"
    packed_folder(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "v1").write_text(commit)
    options = {"cache_dir": tmp_path, "revision": "v1", "local_files_only": True}
    expected = load_packed(home / "snapshots" / commit)
    assert_same(load("someone/packed", **options), expected)
    manifest = (home / "snapshots" / commit / MANIFEST).rename(tmp_path / MANIFEST)
    with pytest.raises(CTPError, match=r"no ctp_manifest|cannot find the files"):
        load("someone/packed", **options)

    def download(name: str, *, revision: str, cache_dir: Path, allow_patterns: list[str]) -> str:
        assert (name, cache_dir) == ("someone/packed", tmp_path) and "*.json" in allow_patterns
        return str(shutil.copy(manifest, home / "snapshots" / revision / MANIFEST).parent)

    monkeypatch.setattr("ctp_kernels.checkpoints.load.snapshot_download", download)
    assert_same(load("someone/packed", **options), expected)


SOURCES = {
    "patched": lambda folder: patch_model(small_model(LLAMA), "int4"),
    "load_packed": load_packed,
    "from_pretrained": load,
    "copied": lambda folder: copy.deepcopy(load(folder)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_save_pretrained_writes_what_both_read(tmp_path, source: str) -> None:
    model = SOURCES[source](packed_folder(tmp_path / "packed"))
    model.model.norm.weight.data[0] = 7  # of this model and no other
    model.save_pretrained(tmp_path / "out")
    for read in (load, load_packed):
        assert_same(read(tmp_path / "out"), model)
    with pytest.raises(CTPError, match="save_packed"):
        model.save_pretrained(tmp_path / "out")
    for options in ({"push_to_hub": True}, {"state_dict": {}}):
        with pytest.raises(CTPError, match="can be uploaded"):
            model.save_pretrained(tmp_path / "other", **options)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_an_unpatched_model_is_an_ordinary_one(tmp_path, source: str) -> None:
    model = unpatch_model(SOURCES[source](packed_folder(tmp_path / "packed")))
    model.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config and "transformers_weights" not in config
    loaded = load(tmp_path / "dense")
    assert not any(isinstance(m, PackedLinear) for m in loaded.modules())
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_patch_and_export_take_what_from_pretrained_loaded(tmp_path) -> None:
    folder = packed_folder(tmp_path / "packed", "int4-g32", skip=("lm_head", "up_proj"))
    assert is_packed(load(folder).config) and not is_packed(load_packed(folder).config)
    model = patch_model(load(folder), "int4-g32")
    assert_same(model, patch_model(load_packed(folder), "int4-g32"))
    export_model(model, tmp_path / "gptq", "gptq")
    assert_same(load_packed(tmp_path / "gptq"), model)


def trainer(model, folder: Path) -> Trainer:
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    arguments = TrainingArguments(output_dir=str(folder), max_steps=2, report_to=[], use_cpu=True, save_strategy="no",
                                  learning_rate=1e-2, disable_tqdm=True)  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows)


def test_trainer_refuses_a_model_with_nothing_to_train(tmp_path) -> None:
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(load(packed_folder(tmp_path / "packed")), tmp_path / "out")


def test_peft_trains_a_prompt(tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = load(packed_folder(tmp_path / "packed"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    prompted = peft.get_peft_model(model, config)
    assert [name for name, p in prompted.named_parameters() if p.requires_grad] == [
        "prompt_encoder.default.embedding.weight"
    ]
    prompt = prompted.prompt_encoder["default"].embedding.weight
    start = prompt.detach().clone()
    trainer(prompted, tmp_path / "out").train()
    assert not torch.equal(prompt, start)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    prompted.save_pretrained(tmp_path / "prompt")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "packed"), tmp_path / "prompt").eval()
    assert torch.equal(again(IDS).logits, prompted.eval()(IDS).logits)
