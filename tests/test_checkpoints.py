"""Checkpoints of GPTQ and compressed-tensors: whole models there and back, models loaded elsewhere, bad files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctp_kernels import CTPError, PackedLinear, patch_model
from ctp_kernels.checkpoints import MANIFEST, RECORD, export_model, load_packed, save_packed
from ctp_kernels.fuse import fuse
from tests.helpers import small_model

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


def llama() -> torch.nn.Module:
    """Sizes that GPTQ's readers take: multiples of 32, and of the groups."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=160, tie_word_embeddings=True)  # fmt: skip
    return in_half(LlamaForCausalLM(config).eval().requires_grad_(False))


def in_half(model: torch.nn.Module) -> torch.nn.Module:
    """fp16 parameters, as a file holds them; rotary frequencies stay what they are."""
    for parameter in model.parameters():
        parameter.data = parameter.half()
    model.config.dtype = torch.float16
    return model


def a_model(name: str) -> torch.nn.Module:
    return llama() if name == "llama" else in_half(small_model(name))


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors", "dense"])
@pytest.mark.parametrize("format", ["int4-g32", "int3-g32-asym", "sparse24-int4-g32", "unstructured-int3-row-asym"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_model_there_and_back(tmp_path, name: str, format: str, to: str) -> None:
    model = patch_model(a_model(name), format)
    model.generation_config.max_new_tokens = 7
    expected = model(IDS).logits
    unpacked = {n: m.weight for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    result = export_model(model, tmp_path / "out", to, record={"from": "here"})
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == result and result["from"] == "here"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if to == "dense":
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert all(torch.equal(loaded.get_submodule(n).weight, weight) for n, weight in unpacked.items())
        return
    loaded = load_packed(tmp_path / "out")
    assert not hasattr(loaded.config, "quantization_config") and loaded.generation_config.max_new_tokens == 7
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"].get("lm_head") is not True
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, PackedLinear)}
    assert layers.keys() == unpacked.keys()
    assert all(torch.equal(m.weight, unpacked[n]) for n, m in layers.items())
    assert {m.format.pattern for m in layers.values()} == {"dense"}
    if "sparse" not in format and "unstructured" not in format:
        assert torch.equal(loaded(IDS).logits, expected)
    export_model(loaded, tmp_path / "out", to)  # replaces what it wrote


@pytest.mark.parametrize("format", ["int4", "int3-row"])
def test_sizes_that_fill_no_word_go_through_gptq(tmp_path, format: str) -> None:
    model = patch_model(in_half(small_model("llama-gqa-tied")), format)  # 172 inputs
    export_model(model, tmp_path / "out", "gptq")
    assert torch.equal(load_packed(tmp_path / "out")(IDS).logits, model(IDS).logits)


def ordered_model() -> torch.nn.Module:
    """A packed model whose layers, but those of q, k and v of the first block, have inputs in an order of their own."""
    model = patch_model(llama(), "int4-g32")
    generator = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear) and "layers.0.self_attn" not in name:
            k = layer.in_features
            g_idx = (torch.arange(k) // 32)[torch.randperm(k, generator=generator)]
            layer.input_order = torch.argsort(g_idx, stable=True).int()
    return model


@pytest.mark.parametrize("to", ["gptq", "own"])
def test_a_model_with_orders_of_inputs(tmp_path, to: str) -> None:
    model = ordered_model()
    expected, folder = model(IDS).logits, tmp_path / "out"
    if to == "own":
        save_packed(model, folder)
    else:
        export_model(model, folder, to)
        with pytest.raises(CTPError, match="act-order"):
            export_model(model, tmp_path / "other", "compressed-tensors")
    loaded = load_packed(folder)
    assert torch.equal(loaded(IDS).logits, expected)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded.load_state_dict(model.state_dict())
    assert len(fuse(loaded)) == 1  # the first block's q, k, v
    assert torch.equal(loaded.to(torch.float64).model.layers[1].mlp.up_proj.input_order,
                       model.model.layers[1].mlp.up_proj.input_order)  # fmt: skip


def test_a_damaged_order_is_refused(tmp_path) -> None:
    model = ordered_model()
    layer = model.model.layers[1].mlp.up_proj
    twice = layer.input_order.clone()
    twice[0] = twice[1]
    for wrong in (twice, layer.input_order.long(), layer.input_order[:-1], -layer.input_order):
        with pytest.raises(CTPError, match="input_order"):
            PackedLinear(layer.packed, order=wrong)
        with pytest.raises(RuntimeError, match="input_order"):
            layer.load_state_dict(layer.state_dict() | {"input_order": wrong})


def edit(folder, change) -> None:
    """`change` gets the tensors and the quantization_config of an exported folder."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


Q = "model.layers.0.self_attn.q_proj"
GPTQ_DAMAGE = {
    "no-scales": (lambda t, c: t.pop(f"{Q}.scales"), "scales"),
    "unknown-tensor": (lambda t, c: t.update({f"{Q}.input_scale": torch.ones(1)}), "input_scale"),
    "unknown-layer": (lambda t, c: t.update({"model.x.qweight": t[f"{Q}.qweight"].clone()}), "model.x"),
    "missing-norm": (lambda t, c: t.pop("model.norm.weight"), "model.norm.weight"),
    "width": (lambda t, c: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:5]}), "2, 3, 4 or 8 bits"),
    "zeros": (lambda t, c: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][:, :2]}), "qzeros"),
    "dtype": (lambda t, c: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].long()}), "int32"),
    "nan": (lambda t, c: t[f"{Q}.scales"].fill_(float("nan")), "finite"),
    "nan-norm": (lambda t, c: t["model.norm.weight"].fill_(float("nan")), "NaN"),
    "g_idx-high": (lambda t, c: t[f"{Q}.g_idx"].fill_(2), "outside"),
    "g_idx-low": (lambda t, c: t[f"{Q}.g_idx"].neg_(), "outside"),
    "g_idx-uneven": (lambda t, c: t[f"{Q}.g_idx"].__setitem__(0, 1), "one size"),
    "g_idx-shape": (lambda t, c: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"][:8]}), "shape"),
    "layout": (lambda t, c: c.update(checkpoint_format="marlin"), "marlin"),
    "marlin": (lambda t, c: c.update(is_marlin_format=True), "marlin"),
    "method": (lambda t, c: c.update(quant_method="awq"), "not a packed checkpoint"),
    "method-list": (lambda t, c: c.update(quant_method=["gptq"]), "not a packed checkpoint"),
    "layout-list": (lambda t, c: c.update(checkpoint_format=[1]), "quantization_config"),
    "no-groups": (lambda t, c: [t.update({f"{Q}.{x}": t[f"{Q}.{x}"][:0]}) for x in ("qzeros", "scales")], Q),
    "no-g_idx": (lambda t, c: (t.pop(f"{Q}.g_idx"), c.update(desc_act=True)), "g_idx"),
    "g_idx-kind": (lambda t, c: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"].to(torch.complex64)}), Q),
    "norm-shape": (lambda t, c: t.update({"model.norm.weight": torch.ones(3)}), "do not hold this model"),
    "bias-shape": (lambda t, c: t.update({f"{Q}.bias": torch.ones(3)}), "outputs"),
}
CT_DAMAGE = {
    "no-scale": (lambda t, c: t.pop(f"{Q}.weight_scale"), "weight_scale"),
    "shape": (lambda t, c: t[f"{Q}.weight_shape"].fill_(1), "weight_shape"),
    "width": (lambda t, c: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][:, :5]}), "2, 3, 4 or 8 bits"),
    "bits": (lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=5), "2, 3, 4 or 8 bits"),
    "scales": (lambda t, c: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:3]}), "weight_scale"),
    "zeros": (lambda t, c: t.update({f"{Q}.weight_zero_point": torch.zeros(3, 2, dtype=torch.int32)}), "zero_point"),
    "float": (lambda t, c: c["config_groups"]["group_0"]["weights"].update(type="float"), "float codes"),
    "activations": (
        lambda t, c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
        "activations",
    ),
    "layout": (lambda t, c: c.update(format="nvfp4-pack-quantized"), "nvfp4"),
    "groups-list": (lambda t, c: c.update(config_groups=[1]), "quantization_config"),
    "weights-text": (lambda t, c: c["config_groups"]["group_0"].update(weights="int4"), "quantization_config"),
    "outputs": (lambda t, c: c["config_groups"]["group_0"].update(output_activations={"num_bits": 8}), "activations"),
    "cache": (lambda t, c: c.update(kv_cache_scheme={"num_bits": 8}), "activations"),
    "transform": (lambda t, c: c.update(transform_config={"config_groups": {}}), "transform_config"),
    "no-zeros": (lambda t, c: c["config_groups"]["group_0"]["weights"].update(symmetric=False), "zero_point"),
    "wide-zeros": (lambda t, c: t.update({f"{Q}.weight_zero_point": torch.full((64, 2), 2**32)}), "zero_point"),
}


@pytest.mark.parametrize(
    ("to", "case"), [*(("gptq", case) for case in GPTQ_DAMAGE), *(("compressed-tensors", case) for case in CT_DAMAGE)]
)
def test_what_is_not_read_is_named(tmp_path, to: str, case: str) -> None:
    change, told = (GPTQ_DAMAGE if to == "gptq" else CT_DAMAGE)[case]
    folder = tmp_path / "out"
    export_model(patch_model(llama(), "int4-g32"), folder, to)
    edit(folder, change)
    with pytest.raises(CTPError, match=told) as error:
        load_packed(folder)
    assert "\n" not in str(error.value)


DAMAGED_CONFIGS = {
    "list": lambda c: c.update(quantization_config=[1]),
    "text": lambda c: c.update(quantization_config="gptq"),
    "width": lambda c: c.update(hidden_size="64"),
    "heads": lambda c: c.update(num_attention_heads=0),
    "activation": lambda c: c.update(hidden_act="foo"),
    "kind": lambda c: c.update(model_type="t5"),
}


@pytest.mark.parametrize("case", DAMAGED_CONFIGS)
def test_damaged_configurations_are_one_sentence(tmp_path, case: str) -> None:
    folder = tmp_path / "out"
    export_model(patch_model(llama(), "int4-g32"), folder, "gptq")
    config = json.loads((folder / "config.json").read_text())
    DAMAGED_CONFIGS[case](config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CTPError) as error:
        load_packed(folder)
    assert "\n" not in str(error.value)


def test_a_norm_in_another_dtype_is_cast(tmp_path) -> None:
    folder, model = tmp_path / "out", patch_model(llama(), "int4-g32")
    export_model(model, folder, "gptq")
    edit(folder, lambda t, c: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    assert torch.equal(load_packed(folder)(IDS).logits, model(IDS).logits)


def test_files_in_parts(tmp_path) -> None:
    folder = tmp_path / "out"
    model = patch_model(llama(), "int4-g32")
    export_model(model, folder, "gptq")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    with pytest.raises(CTPError, match="2 safetensors files"):
        load_packed(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, own in files.items() for name in own}}))
    assert torch.equal(load_packed(folder)(IDS).logits, model(IDS).logits)
    save_file({names[0]: tensors[names[0]], names[1]: tensors[names[1]]}, folder / "b.safetensors")
    with pytest.raises(CTPError, match="another file holds"):
        load_packed(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../out/a.safetensors"}}))
    with pytest.raises(CTPError, match="lacks the file"):
        load_packed(folder)
    index.write_text("[]")
    with pytest.raises(CTPError, match="damaged"):
        load_packed(folder)


def test_biases_that_the_model_has_not(tmp_path) -> None:
    """AutoGPTQ wrote a bias of zeros for every layer; one that is not zero is kept."""
    folder, model = tmp_path / "out", patch_model(llama(), "int4-g32")
    export_model(model, folder, "gptq")
    edit(folder, lambda t, c: t.update({f"{Q}.bias": torch.zeros(64), f"{Q[:-6]}v_proj.bias": torch.ones(32).half()}))
    loaded = load_packed(folder)
    attention = loaded.model.layers[0].self_attn
    assert attention.q_proj.bias is None and torch.equal(attention.v_proj.bias, torch.ones(32).half())


def test_old_buffers_are_passed_over(tmp_path) -> None:
    folder = tmp_path / "out"
    export_model(patch_model(llama(), "int4-g32"), folder, "gptq")
    edit(folder, lambda t, c: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_packed(folder)


def test_layers_of_several_formats_and_dense_ones(tmp_path) -> None:
    model = patch_model(llama(), "int4-g32", skip=("lm_head", "*.0.mlp.*"))
    export_model(model, tmp_path / "out", "gptq")
    dynamic = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["dynamic"]
    assert list(dynamic) == [rf"-:^model\.layers\.0\.mlp\.{name}_proj$" for name in ("gate", "up", "down")]
    assert torch.equal(load_packed(tmp_path / "out")(IDS).logits, model(IDS).logits)
    patch_model(model, "int3-g32")
    with pytest.raises(CTPError, match="int3-g32, int4-g32"):
        export_model(model, tmp_path / "both", "gptq")
    assert not (tmp_path / "both").exists()


def test_a_packed_head_that_the_configuration_calls_tied(tmp_path) -> None:
    model = patch_model(llama(), "int4-g32", skip=())
    head, expected = model.lm_head.weight, model(IDS).logits
    export_model(model, tmp_path / "out", "gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(load_packed(tmp_path / "out")(IDS).logits, expected)
    export_model(model, tmp_path / "dense", "dense")
    from transformers import AutoModelForCausalLM

    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").lm_head.weight, head)


def test_a_packed_head_is_tied_no_more(tmp_path) -> None:
    for to in ("gptq", "compressed-tensors"):
        model = patch_model(llama(), "int4-g32", skip=())
        expected = model(IDS).logits
        export_model(model, tmp_path / to, to)
        loaded = load_packed(tmp_path / to)
        assert isinstance(loaded.lm_head, PackedLinear) and torch.equal(loaded(IDS).logits, expected)
        packing = json.loads((tmp_path / to / "config.json").read_text())["quantization_config"]
        assert packing["lm_head"] if to == "gptq" else "lm_head" not in packing["ignore"]


class Foreign(torch.nn.Module):
    """A layer as another library leaves it in memory: in a layout of its own, of which only the sizes can be known."""

    def __init__(self, linear: PackedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("bias", linear.bias)


def loaded_elsewhere(folder) -> torch.nn.Module:
    """The model of an exported folder, with layers that are not this package's."""
    model = load_packed(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            model.set_submodule(name, Foreign(module))
    model.config.quantization_config = json.loads((folder / "config.json").read_text())["quantization_config"]
    model.config._name_or_path = str(folder)
    return model


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_model_that_another_library_loaded_is_repacked_from_its_files(tmp_path, name: str, to: str) -> None:
    skip = ("lm_head", "up_proj") if name == "llama" else ("lm_head",)
    expected = patch_model(a_model(name), "int3-g32-asym", skip=skip)
    export_model(expected, tmp_path / "out", to)
    model = loaded_elsewhere(tmp_path / "out").train()
    model.hf_quantizer, model.is_quantized = object(), True
    patch_model(model)
    assert all(m.training for m in model.modules()) and not hasattr(model, "hf_quantizer") and not model.is_quantized
    assert torch.equal(model.eval()(IDS).logits, expected(IDS).logits)
    assert {layer.note for layer in model.ctp_report.layers} == {"repacked, each code as it was"}
    left = [name for name, why in model.ctp_report.skipped.items() if why == "its checkpoint left it dense"]
    assert len(left) == (2 if name == "llama" else 0)
    assert not hasattr(model.config, "quantization_config")
    if name == "llama":  # a format that is asked for is for what the checkpoint left dense
        named = patch_model(loaded_elsewhere(tmp_path / "out"), "int4-g32")
        assert {m.format.name for m in named.modules() if isinstance(m, PackedLinear)} == {"int3-g32-asym", "int4-g32"}
    save_packed(model, tmp_path / "own")
    assert torch.equal(load_packed(tmp_path / "own")(IDS).logits, expected(IDS).logits)


def test_a_model_whose_files_are_gone_is_not_repacked(tmp_path) -> None:
    export_model(patch_model(llama(), "int4-g32"), tmp_path / "out", "gptq")
    model = loaded_elsewhere(tmp_path / "out")
    for name, told in (("no/where", "cannot find"), (str(tmp_path), "holds no GPTQ")):
        model.config._name_or_path = name
        with pytest.raises(CTPError, match=told) as error:
            patch_model(model)
        assert "\n" not in str(error.value)
    model.config._name_or_path = str(tmp_path / "out")
    model.config.quantization_config["bits"] = 8  # of another revision
    with pytest.raises(CTPError, match="another checkpoint"):
        patch_model(model)
    model.config.quantization_config["bits"] = 4
    model.model.layers[0].mlp.up_proj.adapter = torch.nn.Linear(64, 160)
    with pytest.raises(CTPError, match="adapters"):
        patch_model(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, Foreign)


REFUSED = {
    "floating": ("llama", "sparse24", "compressed-tensors", "export it as dense"),
    "groups": ("llama", "int4-g24", "compressed-tensors", "a multiple of the groups"),
    "unknown": ("llama", "int4-g32", "awq", "choose gptq"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layout_cannot_hold_is_refused(tmp_path, case: str) -> None:
    name, format, to, told = REFUSED[case]
    with pytest.raises(CTPError, match=told):
        export_model(patch_model(a_model(name), format), tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_other_folders_are_not_replaced(tmp_path) -> None:
    model = patch_model(llama(), "int4-g32")
    save_packed(model, tmp_path / "own")
    for to in ("gptq", "dense"):
        with pytest.raises(CTPError, match="would be lost"):
            export_model(model, tmp_path / "own", to)
    assert (tmp_path / "own" / MANIFEST).is_file() and isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    with pytest.raises(CTPError, match="no packed layer"):
        export_model(llama(), tmp_path / "new", "gptq")
