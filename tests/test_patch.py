"""patch_model and unpatch_model on whole models, and the packed checkpoint."""

import json

import pytest
import torch

from ctp_kernels import CTPError, PackedLinear, explain, patch_model, unpatch_model
from ctp_kernels.checkpoints import MANIFEST, load_packed, save_packed
from tests.helpers import MODELS, small_model

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", ["int4", "sparse24-int3-g64-asym", "unstructured"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_and_unpacked_models_agree(name, format):
    model = small_model(name)
    patch_model(model, format)
    packed_logits = model(IDS).logits
    tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert len(model.ctp_report.layers) > 0
    unpatch_model(model)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    assert torch.allclose(model(IDS).logits, packed_logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), tokens)


def test_unpatch_of_floating_values_gives_the_weights_back():
    model = small_model("llama-gqa-tied")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    unpatch_model(patch_model(model, "unstructured"))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_auto_looks_at_each_weight():
    model = small_model("llama-gqa-tied")
    block = model.model.layers[0].mlp
    block.up_proj.weight.view(-1, 4)[:, 1:3] = 0
    block.gate_proj.weight.mul_(torch.rand_like(block.gate_proj.weight) > 0.7)
    block.down_proj.weight.mul_(torch.rand_like(block.down_proj.weight) > 0.1)
    patch_model(model)
    assert block.up_proj.format.name == "sparse24-fp32"
    assert block.gate_proj.format.name == "unstructured-fp32"
    assert block.down_proj.format.name == "int4"


def test_report_counts_and_names_what_was_skipped():
    model = small_model("llama-gqa-tied")
    dense = sum(m.weight.nbytes for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    report = patch_model(model, "int4", skip=("lm_head", "*.1.*", "q_proj")).ctp_report
    assert len(report.layers) == 6
    assert set(report.skipped) >= {"lm_head", "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"}
    assert report.bytes_packed == sum(m.packed.nbytes for m in model.modules() if isinstance(m, PackedLinear))
    assert report.bytes_dense < dense and "skipped" in str(report)
    json.dumps(report.to_dict())


def test_patching_twice_keeps_the_packed_layers():
    model = patch_model(small_model("opt"), "int3")
    codes = model.model.decoder.layers[0].fc1.codes
    patch_model(model, "int4")
    assert model.model.decoder.layers[0].fc1.codes is codes


def test_explain_says_what_runs_and_why():
    model = patch_model(small_model("opt"), "int3")
    rows = explain(model).rows
    assert len(rows) == len(model.ctp_report.layers)
    assert all(row["forward"] and row["backward"] for row in rows)
    assert "int3" in str(explain(model))
    slow = patch_model(small_model("opt"), "int3", backend="reference")
    assert {row["forward"] for row in explain(slow).rows} == {"reference"}


def test_explain_shows_the_plan_of_a_gpu_that_need_not_be_there():
    pytest.importorskip("triton")
    model = patch_model(small_model("llama-gqa-tied"), "int4", fuse=True)
    explained = explain(model, torch.bfloat16, device="cuda", rows=(1, 16, 4096))
    (q, *_), text = explained.rows, str(explained)
    assert (q["forward"], q["backward"]) == ("triton", "triton") and q["launch_rows"] == 128
    assert q["plan_forward"][1].startswith("triton: decode ") and q["plan_backward"][16].startswith("triton: tile ")
    assert "int4 (128, 64) forward, 4096 rows: triton: dequantise, then the dense product (by the rule)" in text
    assert explain(model, rows=(1,)).rows[0]["plan_forward"][1].startswith("cpu: ")


def test_requests_that_cannot_be_met_change_nothing():
    model = small_model("llama-gqa-tied")
    model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(CTPError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        patch_model(model, "int4")
    model = small_model("llama-gqa-tied")
    for bad in ({"skip": ("no_such_layer",)}, {"backend": "no_such"}, {"backend": "triton"}, {"format": "int5"}):
        with pytest.raises(CTPError):
            patch_model(model, **{"format": "int4", **bad})
    odd = torch.nn.Sequential(torch.nn.Linear(6, 4))
    with pytest.raises(CTPError, match="K = 6"):
        patch_model(odd, "sparse24")
    with pytest.raises(CTPError, match=r"no nn\.Linear"):
        patch_model(torch.nn.Sequential(torch.nn.ReLU()))
    with pytest.raises(CTPError, match="no packed layer"):
        unpatch_model(odd)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_a_weight_that_the_values_cannot_hold_changes_nothing():
    model = small_model("opt").bfloat16()
    model.model.decoder.layers[1].fc2.weight[0, 0] = 1e5
    with pytest.raises(CTPError, match=r"fc2.*fp16 cannot hold"):
        patch_model(model, "unstructured-fp16")
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_a_shared_layer_is_replaced_everywhere():
    linear = torch.nn.Linear(64, 8)
    model = torch.nn.ModuleDict({"a": linear, "b": torch.nn.Sequential(linear)})
    patch_model(model, "int4")
    assert isinstance(model["a"], PackedLinear) and model["b"][0] is model["a"]
    unpatch_model(model)
    assert type(model["a"]) is torch.nn.Linear and model["b"][0] is model["a"]


def test_a_layer_alone_cannot_be_replaced_in_place():
    with pytest.raises(CTPError, match="one Linear"):
        patch_model(torch.nn.Linear(64, 8), "int4")
    with pytest.raises(CTPError, match=r"takes a torch\.nn\.Module, not NoneType"):
        patch_model(None, "int4")  # type: ignore[arg-type]
    packed = patch_model(torch.nn.Sequential(torch.nn.Linear(64, 8)), "int4")[0]
    with pytest.raises(CTPError, match="one packed layer"):
        unpatch_model(packed)


def test_every_skip_that_matches_counts():
    model = small_model("opt")
    patch_model(model, "int4", skip=("*fc1", "fc1", "lm_head"))
    assert isinstance(model.model.decoder.layers[0].fc2, PackedLinear)


def test_hooks_go_along():
    model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    seen = []
    handle = model[0].register_forward_hook(lambda module, *_: seen.append(type(module)))
    patch_model(model, "int4")(torch.ones(1, 64))
    unpatch_model(model)(torch.ones(1, 64))
    handle.remove()
    model(torch.ones(1, 64))
    assert seen == [PackedLinear, torch.nn.Linear]


def test_a_model_may_look_at_a_layers_weight():
    model = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 64)
    patch_model(model, "int8")
    assert model.linear1.weight.shape == (128, 64) and model.linear1.weight.dtype == torch.float32
    with torch.no_grad():
        packed = model(x)
        assert torch.allclose(packed, unpatch_model(model)(x), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("skip", [("lm_head",), ()])
def test_checkpoint_round_trip(tmp_path, name, skip):
    model = patch_model(small_model(name), "unstructured-int3-g64", skip=skip)
    save_packed(model, tmp_path / "packed", info={"method": "rtn"})
    loaded = load_packed(tmp_path / "packed")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert json.loads((tmp_path / "packed" / MANIFEST).read_text())["info"] == {"method": "rtn"}
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def edit_manifest(folder, change):
    path = folder / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


DAMAGE = {
    "truncated": lambda f: (f / "ctp_model.safetensors").write_bytes((f / "ctp_model.safetensors").read_bytes()[:-7]),
    "flipped": lambda f: (f / "ctp_model.safetensors").write_bytes(
        (f / "ctp_model.safetensors").read_bytes()[:-1] + bytes([(f / "ctp_model.safetensors").read_bytes()[-1] ^ 1])
    ),
    "missing": lambda f: (f / "ctp_model.safetensors").unlink(),
    "not-json": lambda f: (f / MANIFEST).write_text("{"),
    "version": lambda f: edit_manifest(f, lambda m: m.update(version=99)),
    "no-layers": lambda f: edit_manifest(f, lambda m: m.pop("layers")),
    "unknown-layer": lambda f: edit_manifest(f, lambda m: m["layers"].update(x=dict(next(iter(m["layers"].values()))))),
    "wrong-format": lambda f: edit_manifest(f, lambda m: next(iter(m["layers"].values())).update(format="sparse24")),
    "wrong-shape": lambda f: edit_manifest(f, lambda m: next(iter(m["layers"].values())).update(shape=[1, 2**40])),
    "no-dtype": lambda f: edit_manifest(f, lambda m: next(iter(m["layers"].values())).update(dtype=[])),
    "ties": lambda f: edit_manifest(f, lambda m: m.update(tied={"x": ["y"]})),
    "file-entry": lambda f: edit_manifest(f, lambda m: m.update(files={"ctp_model.safetensors": 5})),
    "path-escape": lambda f: edit_manifest(f, lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    folder = tmp_path / "packed"
    save_packed(patch_model(small_model("opt"), "int4"), folder)
    DAMAGE[damage](folder)
    with pytest.raises(CTPError) as error:
        load_packed(folder)
    assert "\n" not in str(error.value)


def test_a_model_in_double_precision_is_saved_and_loaded(tmp_path):
    model = patch_model(small_model("opt").double(), "int4")
    save_packed(model, tmp_path / "packed")
    assert {row["forward"] for row in explain(model).rows} == {"reference"}
    assert torch.equal(load_packed(tmp_path / "packed").double()(IDS).logits, model(IDS).logits)


def test_saving_again_replaces_the_folder_as_a_whole(tmp_path):
    save_packed(patch_model(small_model("opt"), "int4"), tmp_path / "packed")
    (tmp_path / "packed" / "stale.txt").write_text("old")
    save_packed(patch_model(small_model("opt"), "int3"), tmp_path / "packed")
    assert not (tmp_path / "packed" / "stale.txt").exists()
    assert load_packed(tmp_path / "packed").model.decoder.layers[0].fc1.format.name == "int3"
    with pytest.raises(CTPError, match="no packed layer"):
        save_packed(small_model("opt"), tmp_path / "packed")
    assert (tmp_path / "packed" / MANIFEST).exists()


def test_int8_activations_are_a_switch_that_can_be_turned_back():
    model = small_model("opt")
    tokens = torch.arange(12)[None]
    exact = patch_model(model, "int4")(tokens).logits
    rounded = patch_model(model, "int4", compute="int8")(tokens).logits
    difference = ((rounded - exact).norm() / exact.norm()).item()
    assert 0 < difference < 0.05
    assert "compute=int8" in repr(model)
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()  # the backward is that of the exact product
    assert embeddings.grad is not None and embeddings.grad.isfinite().all()
    assert torch.equal(patch_model(model, "int4")(tokens).logits, exact)


def test_int8_activations_are_refused_before_anything_changes():
    model = small_model("opt")
    with pytest.raises(CTPError, match="multiplies codes"):
        patch_model(model, "sparse24", compute="int8")
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    patch_model(model, "sparse24")
    with pytest.raises(CTPError, match="multiplies codes"):
        patch_model(model, compute="int8")
    assert all(m.compute == "exact" for m in model.modules() if isinstance(m, PackedLinear))
