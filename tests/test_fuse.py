"""Fused layers (q, k, v; gate, up): same results, one launch, and nothing else changes."""

import copy

import pytest
import torch

from ctp_kernels import PackedLinear, explain, patch_model, unpatch_model
from ctp_kernels.checkpoints import load_packed, save_packed
from tests.helpers import MODELS, small_model

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
FORMATS = ["int4-asym", "sparse24-int3", "unstructured-int4", "unstructured", "sparse24"]


def pair(name: str, format: str):
    """The same model packed without and with fusing."""
    return patch_model(small_model(name), format), patch_model(small_model(name), format, fuse=True)


@pytest.fixture
def launches(monkeypatch):
    """Counts matmuls."""
    from ctp_kernels.backends import cpu

    rows, run = [], cpu.matmul
    monkeypatch.setattr(
        cpu, "matmul", lambda x, tensors, format, n, *rest: rows.append(n) or run(x, tensors, format, n, *rest)
    )
    return rows  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_same_logits_tokens_and_state(name, format):
    alone, fused = pair(name, format)
    assert fused.ctp_report.fused and not alone.ctp_report.fused
    # The outputs are slices of one tensor, so that attention may take another path: the last bits differ.
    assert torch.allclose(fused(IDS).logits, alone(IDS).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(fused.generate(IDS, max_new_tokens=6), alone.generate(IDS, max_new_tokens=6))
    a, b = alone.state_dict(), fused.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_one_launch_for_each_group(launches):
    _, fused = pair("llama-gqa-tied", "int4")
    fused(IDS)
    assert launches == [64 + 32 + 32, 64, 172 + 172, 64] * 2
    assert [row["launch_rows"] for row in explain(fused).rows][:5] == [128, 128, 128, 64, 344]


def test_no_byte_is_held_twice():
    for format in ("int4-asym", "sparse24-int3", "unstructured-int4"):
        alone, fused = pair("llama-biases", format)

        def held(model):
            tensors = list(model.state_dict().values())
            tensors += [t for m in model.modules() if getattr(m, "group", None) for t in m.group.tensors]
            tensors = [t for t in tensors if t.dtype == torch.uint8 or t.is_floating_point()]
            return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

        assert held(fused) == held(alone)


def test_gradients_of_inputs():
    alone, fused = pair("llama-biases", "unstructured-int4")
    grads = []
    for model in (alone, fused):
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits.square().mean().backward()
        grads.append(embeddings.grad)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-7) and grads[0].abs().max() > 0


def attention(model):
    return model.model.layers[0].self_attn


def test_kept_outputs_are_only_for_the_very_input(launches):
    alone, fused = pair("llama-gqa-tied", "int4")
    one, other = attention(alone), attention(fused)
    x = torch.randn(3, 64)
    assert torch.equal(other.v_proj(x), one.v_proj(x))
    y = torch.randn(3, 64)
    assert torch.equal(other.q_proj(y), one.q_proj(y))  # k and v of y stay unasked for
    assert torch.equal(other.k_proj(x), one.k_proj(x))
    x.mul_(2)  # k_proj's multiplication left outputs for the old x
    assert torch.equal(other.q_proj(x), one.q_proj(x))
    assert torch.equal(other.q_proj(x), one.q_proj(x))  # asked for twice
    z = torch.randn(3, 64, requires_grad=True)
    with torch.no_grad():
        other.q_proj(z)
    assert other.k_proj(z).requires_grad
    with torch.inference_mode():
        w = torch.randn(3, 64)
        assert torch.equal(other.q_proj(w), one.q_proj(w)) and torch.equal(other.v_proj(w), one.v_proj(w))


def test_a_layer_that_is_asked_in_turn_keeps_nothing():
    _, fused = pair("llama-gqa-tied", "int4")
    fused(IDS)
    groups = {m.group for m in fused.modules() if getattr(m, "group", None)}
    assert len(groups) == 4 and all(group._pending is None for group in groups)


def test_trainable_biases_get_gradients():
    _, fused = pair("llama-biases", "int4")
    block = attention(fused)
    block.k_proj.bias.requires_grad_(True)
    x = torch.randn(7, 64)
    (block.q_proj(x).sum() + block.k_proj(x).sum()).backward()
    assert torch.equal(block.k_proj.bias.grad, torch.full((32,), 7.0))


@pytest.mark.parametrize("format", ["int4", "unstructured", "sparse24-int3"])
def test_casting_copying_and_loading_refresh_the_group(format):
    alone, fused = pair("llama-biases", format)
    copied = copy.deepcopy(fused)
    for model in (fused, copied):
        group = attention(model).q_proj.group
        assert group.parts[0] is attention(model).q_proj
    x = torch.randn(3, 64)
    with torch.no_grad():
        for part in copied.modules():
            if isinstance(part, PackedLinear):
                (part.scales if part.format.quantized else part.values).mul_(2)
                part.bias.mul_(2)
        assert torch.equal(attention(copied).q_proj(x), 2 * attention(alone).q_proj(x))
        assert torch.equal(attention(fused).q_proj(x), attention(alone).q_proj(x))
        fused.load_state_dict(copied.state_dict())
        assert torch.equal(attention(fused).v_proj(x), attention(copied).v_proj(x))
        half, plain = fused.bfloat16(), copy.deepcopy(copied).bfloat16()
        for part in ("q_proj", "k_proj", "v_proj"):
            wide = getattr(attention(half), part)
            assert wide.group.tensors is not None
            assert torch.equal(wide(x.bfloat16()), getattr(attention(plain), part)(x.bfloat16()))


def test_loading_an_unstructured_weight_with_more_entries():
    fused, other = (patch_model(small_model("llama-gqa-tied"), "unstructured", fuse=True) for _ in range(2))
    dense = small_model("llama-gqa-tied")
    for module in dense.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.mul_(torch.rand_like(module.weight) > 0.5)
    packed = patch_model(dense, "unstructured")
    for assign in (False, True):
        model = (fused, other)[assign]
        model.load_state_dict(packed.state_dict(), assign=assign)
        assert torch.allclose(model(IDS).logits, packed(IDS).logits, atol=1e-4)


def test_loading_an_unstructured_weight_with_as_many_entries_elsewhere():
    def model(seed, **options):
        parts = torch.nn.ModuleDict({name: torch.nn.Linear(300, 16) for name in ("q_proj", "k_proj", "v_proj")})
        random = torch.Generator().manual_seed(seed)
        for part in parts.values():
            part.requires_grad_(False).weight.mul_(torch.rand(16, 300, generator=random).argsort(1) < 150)
        return patch_model(parts, "unstructured-int4", **options)

    source, fused = model(0), model(1, fuse=True)
    fused.load_state_dict(source.state_dict())
    for m in (1, 40, 120):
        for name, part in source.items():
            assert fused[name].group is not None
            x, y = (torch.ones(m, 300).requires_grad_() for _ in range(2))
            got, want = fused[name](x), part(y)
            assert torch.allclose(got, want, atol=1e-5)
            got.square().sum().backward()
            want.square().sum().backward()
            assert torch.allclose(x.grad, y.grad, atol=1e-4)


def test_unpatching_and_saving_see_the_parts(tmp_path):
    alone, fused = pair("llama-biases", "sparse24-int4")
    save_packed(fused, tmp_path / "fused")
    loaded = load_packed(tmp_path / "fused")
    assert torch.equal(loaded(IDS).logits, alone(IDS).logits)
    patch_model(loaded, fuse=True)
    assert len(loaded.ctp_report.fused) == 4 and torch.allclose(loaded(IDS).logits, alone(IDS).logits, atol=1e-4)
    patch_model(loaded)
    assert not loaded.ctp_report.fused and not any(m.group for m in loaded.modules() if isinstance(m, PackedLinear))
    before = fused(IDS).logits
    assert torch.allclose(unpatch_model(fused)(IDS).logits, before, atol=1e-4, rtol=1e-4)


def test_layers_of_other_formats_are_left_alone():
    model = small_model("llama-gqa-tied")
    attention(model).k_proj.weight.view(-1, 4)[:, 1:3] = 0
    patch_model(model, fuse=True)
    assert attention(model).k_proj.format.pattern == "sparse24" and attention(model).q_proj.group is None
    assert len(model.ctp_report.fused) == 3
