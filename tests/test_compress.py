"""The walk over a model: every family, resume, bad input, and what the methods are worth on a real model."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from ctp.compress import CompressReport, compress_model, walk
from ctp.model import block_linears, decoder_blocks
from ctp_kernels import CTPError, PackedLinear, unpatch_model
from tests.helpers import MODELS, SHARED, SMALL, STORIES, needs_shared, small_model


def tokens(count: int = 6, length: int = 24, vocabulary: int = 96) -> torch.Tensor:
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


def run(model: torch.nn.Module, windows: torch.Tensor | None, format: str, **options) -> CompressReport:
    return compress_model(model, windows, format, progress=False, **options)  # type: ignore[arg-type]


def buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: b for name, b in model.named_buffers() if "rotary" not in name}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", ["int4-g24-asym", "sparse24-int3"])
def test_every_family_compresses_and_runs(name: str, format: str) -> None:
    model = small_model(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    expected = model(tokens()).logits
    report = run(model, tokens(), format, batch_size=4)
    linears = [m for _, block in decoder_blocks(model) for m in block_linears(block).values()]
    assert len(linears) == len(report.rows) and all(isinstance(m, PackedLinear) for m in linears)
    kept = dict(model.named_parameters())
    assert all(torch.equal(before[n], p) for n, p in kept.items()), "embeddings, norms, biases and head stay"
    assert len(before) - len(kept) == len(linears)
    logits = model(tokens()).logits
    dense = unpatch_model(copy.deepcopy(model))
    assert torch.allclose(dense(tokens()).logits, logits, atol=1e-4)
    assert not torch.allclose(logits, expected, atol=1e-4)
    assert {row.error_of for row in report.rows} == {"outputs"}


def test_blocks_with_masks_of_their_own() -> None:
    """Qwen2 with sliding windows in the second block only: each block gets the mask that the model gives it."""
    torch.manual_seed(0)
    config = Qwen2Config(**SMALL, num_key_value_heads=2, intermediate_size=88, use_sliding_window=True,
                         sliding_window=4, max_window_layers=1)  # fmt: skip
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    assert len(set(config.layer_types)) == 2
    seen = {}

    def keep(module, args, output):
        seen["hidden"] = output[0] if isinstance(output, tuple) else output

    streams = walk.Activations(model, decoder_blocks(model), tokens(5), 2)
    for index in range(2):
        streams.advance(index)
    hook = decoder_blocks(model)[-1][1].register_forward_hook(keep)
    model(tokens(5))
    hook.remove()
    assert torch.allclose(torch.cat(streams.hidden), seen["hidden"], atol=1e-5)


def test_error_of_the_table_is_that_of_the_layers_outputs(tmp_path: Path) -> None:
    model = small_model("llama-gqa-tied")
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    model(tokens())
    compressed = copy.deepcopy(model)
    run(compressed, tokens(), "int3", csv_path=tmp_path / "errors.csv")
    with open(tmp_path / "errors.csv", newline="") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert len(rows) == 14
    name = "model.layers.0.self_attn.q_proj"  # its inputs are those of the dense model
    layer = model.get_submodule(name)
    packed = compressed.get_submodule(name).packed
    wanted, got = inputs[name] @ layer.weight.T, inputs[name] @ packed.unpack().T
    assert float(rows[name]["relative_error"]) == pytest.approx(
        float((wanted - got).square().sum() / wanted.square().sum()), rel=1e-3
    )
    assert float(rows[name]["bits_per_weight"]) == packed.bits_per_weight
    assert rows[name] | {"format": "int3", "method": "gptq", "N": "64", "K": "64", "sparsity": "0.0"} == rows[name]


def test_true_sequential_sees_the_compressed_inputs() -> None:
    codes = {}
    for sequential in (True, False):
        model = small_model("llama-gqa-tied")
        run(model, tokens(), "int3", true_sequential=sequential)
        codes[sequential] = buffers(model)
    same = {n for n in codes[True] if torch.equal(codes[True][n], codes[False][n])}
    assert {n for n in same if "layers.0" in n} >= {n for n in codes[True] if "layers.0" in n and "q_proj" in n}
    assert "model.layers.0.mlp.down_proj.codes" not in same


def test_no_windows_where_none_are_needed() -> None:
    model = small_model("opt")
    report = run(model, None, "int4", method="rtn")
    assert {row.error_of for row in report.rows} == {"weights"}
    run(small_model("opt"), None, "unstructured", method="magnitude", sparsity=0.75)
    for method, format in (("gptq", "int4"), ("wanda", "sparse24")):
        with pytest.raises(CTPError, match="needs calibration"):
            run(small_model("opt"), None, format, method=method)


def test_skip_and_report() -> None:
    model = small_model("llama-gqa-tied")
    report = run(model, tokens(), "int4", skip=("lm_head", "down_proj", "*.1.self_attn.*"))
    assert len(report.skipped) == 6 and len(report.rows) == 8
    for name in report.skipped:
        assert isinstance(model.get_submodule(name), torch.nn.Linear)
    assert report.bits_per_weight == pytest.approx(
        sum(r.bits_per_weight * r.N * r.K for r in report.rows) / sum(r.N * r.K for r in report.rows)
    )
    assert "8 layers to int4 by gptq" in str(report)


class Killed(Exception):
    pass


@pytest.mark.parametrize("format", ["unstructured-int4-asym", "sparse24"])
def test_resume_after_a_kill_gives_the_same_bytes(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small_model("opt")
    run(whole, tokens(), format)
    real = walk.solve
    calls = []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) > 9:  # six linears a block: in the middle of the second
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(walk, "solve", dies)
    with pytest.raises(Killed):
        run(small_model("opt"), tokens(), format, work_dir=tmp_path / "work")
    monkeypatch.setattr(walk, "solve", real)
    model = small_model("opt")
    report = run(model, tokens(), format, work_dir=tmp_path / "work")
    assert report.resumed == 1 and len(report.rows) == 12
    expected, got = buffers(whole), buffers(model)
    assert expected.keys() == got.keys() and all(torch.equal(expected[n], got[n]) for n in expected)
    assert {p.name for p in (tmp_path / "work").iterdir()} == {"run.json", "block-0000", "block-0001"}


def test_work_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    work = tmp_path / "work"
    run(small_model("opt"), tokens(), "int4", work_dir=work)
    other = small_model("opt")
    other.model.decoder.layers[0].fc1.weight[0, 0] += 1  # type: ignore
    changes = [
        (small_model("opt"), tokens(), "int3", {}),
        (small_model("opt"), tokens(), "int4", {"act_order": False}),
        (small_model("opt"), tokens(5), "int4", {}),
        (other, tokens(), "int4", {}),
    ]
    for model, windows, format, options in changes:
        with pytest.raises(CTPError, match="another run"):
            run(model, windows, format, work_dir=work, **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(CTPError, match="other files"):
        run(small_model("opt"), tokens(), "int4", work_dir=tmp_path / "full")


@pytest.mark.parametrize("file", ["weights.safetensors", "layers.json"])
def test_damaged_block_is_refused(file: str, tmp_path: Path) -> None:
    run(small_model("opt"), tokens(), "int4", work_dir=tmp_path / "work")
    path = tmp_path / "work" / "block-0001" / file
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CTPError, match="block-0001"):
        run(small_model("opt"), tokens(), "int4", work_dir=tmp_path / "work")


def test_damaged_weight_is_named() -> None:
    model = small_model("llama-gqa-tied")
    model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")  # type: ignore
    with pytest.raises(CTPError, match=r"model\.layers\.1\.mlp\.up_proj: .*NaN"):
        run(model, tokens(), "int4")


def test_damaged_inputs_are_named() -> None:
    model = small_model("llama-gqa-tied")
    model.model.layers[1].input_layernorm.weight[0] = float("inf")  # type: ignore
    with pytest.raises(CTPError, match=r"model\.layers\.1\.self_attn\.q_proj: .*NaN or infinite"):
        run(model, tokens(), "int4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int5"}, "unknown format"),
        ({"method": "magic"}, "unknown method"),
        ({"method": "rtn", "format": "sparse24"}, "rtn only rounds"),
        ({"method": "wanda"}, "prunes"),
        ({"skip": ("nonsense",)}, "skip names no linear"),
        ({"skip": ("*",)}, "nothing is left"),
        ({"windows": torch.zeros(2, 200, dtype=torch.long)}, "context of 128"),
        ({"windows": torch.full((2, 8), 96)}, "token 96"),
        ({"windows": torch.zeros(8, dtype=torch.long)}, "int64"),
        ({"windows": torch.zeros(2, 8)}, "int64"),
        ({"windows": torch.zeros(0, 8, dtype=torch.long)}, "int64"),
        ({"batch_size": 0}, "batch size"),
    ],
)
def test_bad_requests_change_nothing(options: dict, message: str) -> None:
    model = small_model("llama-gqa-tied")
    before = {n: p.clone() for n, p in model.named_parameters()}
    request = {"windows": tokens(), "format": "int4", **options}
    with pytest.raises(CTPError, match=message):
        run(model, request.pop("windows"), request.pop("format"), **request)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_shape_that_the_format_cannot_take_is_named_first() -> None:
    torch.manual_seed(0)
    config = Qwen2Config(**SMALL, num_key_value_heads=2, intermediate_size=90)
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    with pytest.raises(CTPError, match=r"sparse24 does not fit model\.layers\.0\.mlp\.down_proj"):
        run(model, tokens(), "sparse24")


def test_packed_model_is_refused() -> None:
    model = small_model("llama-gqa-tied")
    run(model, None, "int4", method="rtn")
    with pytest.raises(CTPError, match="packed already"):
        run(model, tokens(), "int4")


@pytest.fixture(scope="module")
def stories() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """stories260K, 16 windows of 128 tokens to calibrate, 6 of 512 to score, BOS in front of each."""
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    documents = (SHARED / "data/tinystories/sample.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    parts = (documents[:60], documents[-40:])
    train, test = (tokenizer(" ".join(part), return_tensors="pt").input_ids[0] for part in parts)

    def windows(ids: torch.Tensor, count: int, length: int) -> torch.Tensor:
        body = ids[1 : 1 + count * (length - 1)].view(count, length - 1)
        return torch.nn.functional.pad(body, (1, 0), value=tokenizer.bos_token_id)

    return model, windows(train, 16, 128), windows(test, 6, 512)


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp(sum of NLL / number of scored tokens)."""
    logits = model(windows[:, :-1]).logits
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten()))


@needs_shared
def test_better_methods_give_better_models(stories) -> None:
    model, calibration, test = stories

    def score(format: str, method: str) -> float:
        candidate = copy.deepcopy(model)
        run(candidate, calibration, format, method=method, batch_size=32)
        return perplexity(unpatch_model(candidate), test)

    dense = perplexity(model, test)
    for bits in ("int4", "int3"):
        assert dense < score(bits, "gptq") < score(bits, "rtn")
    pruned = [score("unstructured", method) for method in ("sparsegpt", "wanda", "magnitude")]
    assert dense < pruned[0] < pruned[1] < pruned[2]
    assert dense < score("sparse24-int4", "sparsegpt") < score("sparse24-int4", "wanda")
    assert dense < score("unstructured-int4", "sparsegpt") < score("unstructured-int4", "wanda")
