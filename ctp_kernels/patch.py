"""`patch_model`: swap a model's Linear layers for packed ones, and back; say what was done and what will run."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from .backends import choose, load, row_class
from .errors import CTPError
from .format import FLOAT_DTYPES, Format, as_format, parse_format
from .fuse import fuse as fuse_layers
from .linear import PackedLinear
from .memory import in_huge_pages
from .packed import pack
from .patterns import is_sparse24

DEFAULT_SKIP = ("lm_head",)
#: "auto" takes a sparse pattern only where it shrinks the weight to this share of its dense bytes.
WORTHWHILE = 0.75


@dataclass
class LayerReport:
    """One patched layer; bytes cover the weight alone, not the bias."""

    name: str
    format: str
    shape: tuple[int, int]
    bytes_dense: int
    bytes_packed: int
    note: str = ""


@dataclass
class PatchReport:
    """What `patch_model` did: `layers` that now run packed, `skipped` layer names with the reason, `fused` groups."""

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    fused: list[list[str]] = field(default_factory=list)

    @property
    def bytes_dense(self) -> int:
        return sum(layer.bytes_dense for layer in self.layers)

    @property
    def bytes_packed(self) -> int:
        return sum(layer.bytes_packed for layer in self.layers)

    def to_dict(self) -> dict:
        return {"bytes_dense": self.bytes_dense, "bytes_packed": self.bytes_packed, **asdict(self)}

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers packed, {self.bytes_dense:,} -> {self.bytes_packed:,} bytes "
            f"({self.bytes_dense / max(self.bytes_packed, 1):.2f}x smaller)"
        ]
        for layer in self.layers:
            note = f"   {layer.note}" if layer.note else ""
            lines.append(
                f"  {layer.name:40} {layer.shape!s:16} {layer.format:20} "
                f"{layer.bytes_dense:>12,} -> {layer.bytes_packed:>11,}{note}"
            )
        lines += [f"  {name:40} skipped: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  {', '.join(names)} run in one launch" for names in self.fused]
        return "\n".join(lines)


def patch_model(
    model: nn.Module,
    format: str | Format = "auto",
    *,
    skip: Sequence[str] = DEFAULT_SKIP,
    backend: str = "auto",
    compute: str = "exact",
    fuse: bool | None = None,
) -> nn.Module:
    """Replace every nn.Linear of the model by a PackedLinear, in place, and return the model.

    `format="auto"` looks at each weight: on a 2:4 pattern -> `sparse24`; enough zeros for the bitmap to win ->
    `unstructured`; otherwise dense -> `int4`, round to nearest. A named format packs each weight the plainest
    way (nearest code, two largest magnitudes of four): zeros and codes chosen with more care come from
    `ctp compress`. Layers that are already packed stay as they are. A model that another library loaded from a GPTQ or
    compressed-tensors checkpoint gets that checkpoint's codes, read anew from its files; what it left dense, "auto"
    leaves, too.

    `skip` names layers to leave dense: a full name, a last part (`lm_head`) or a pattern (`*.down_proj`).
    `backend` is "auto" or one of `ctp_kernels.backends.BACKENDS`; `compute` is "exact", or "int8": activations are
    rounded to 8-bit integers per group on the way in, faster from a few rows on, forward only, for formats with codes
    (`ctp_kernels.backends.COMPUTE` gives the error). `fuse`: run q, k, v and gate, up in one launch each, where they
    have one format; by default on a GPU only, where it pays (see fuse.py). All three apply to layers that are packed
    already, too. The report is `model.ctp_report`.

    Raises CTPError, before anything is changed, when nothing matched, a skip matches no layer, a weight holds
    NaN, a format does not fit a shape, or a named backend cannot run it.
    """
    if not isinstance(model, nn.Module):
        raise CTPError(f"patch_model takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise CTPError("the model is one Linear, which cannot be replaced in place: PackedLinear(pack(weight, format))")
    asked = None if format == "auto" else as_format(format)
    from .checkpoints import forget_packing, repack, save_as_packed

    repacked = repack(model)
    linears, skipped = _select(model, skip, repacked)
    if repacked and asked is None:
        skipped |= dict.fromkeys(linears, "its checkpoint left it dense")
        linears = {}
    plan: list[tuple[str, nn.Linear, Format]] = []
    misfits = []
    for name, linear in linears.items():
        try:
            plan.append((name, linear, _plan(linear, asked, backend, compute)))
        except CTPError as error:
            misfits.append(f"{name}: {error}")
    already = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    for name, layer in (already | repacked).items():
        try:
            device = layer.packed.tensors[0].device.type
            shape = (layer.out_features, layer.in_features)
            choose(layer.format, shape, layer.dtype, device, "forward", backend, compute)
        except CTPError as error:
            misfits.append(f"{name}: {error}")
    if misfits:
        more = f" (and {len(misfits) - 3} more layers)" if len(misfits) > 3 else ""
        raise CTPError(
            f"cannot patch {'; '.join(misfits[:3])}{more}; choose another format or backend, or skip these layers"
        )
    if not plan and not already and not repacked:
        raise CTPError(
            f"patch_model found no nn.Linear to pack in {type(model).__name__} (skipped: {list(skipped) or 'none'})"
        )
    report = PatchReport(skipped=skipped)
    for name, packed_layer in already.items():
        packed_layer.backend, packed_layer.compute = backend, compute
        report.layers.append(_layer_report(name, packed_layer, "was packed already"))
    layers = list(repacked.values())
    for name, packed_layer in repacked.items():
        module = model.get_submodule(name)
        packed_layer.backend, packed_layer.compute = backend, compute
        packed_layer.train(module.training)
        _replace(model, module, packed_layer)
        report.layers.append(_layer_report(name, packed_layer, "repacked, each code as it was"))
    if repacked:
        forget_packing(model)
    for name, linear, chosen in plan:
        pruned = chosen.pattern == "sparse24" and not is_sparse24(linear.weight)
        layer = PackedLinear(pack(linear.weight, chosen), linear.bias, backend, compute)
        layer.train(linear.training)
        _replace(model, linear, layer)
        layers.append(layer)
        report.layers.append(_layer_report(name, layer, "pruned to 2:4 by magnitude" if pruned else ""))
    in_huge_pages(layer._buffers for layer in layers)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    report.layers.sort(key=lambda layer: order[layer.name])
    report.fused = fuse_layers(model, lambda layer: layer.packed.tensors[0].is_cuda if fuse is None else fuse)
    model.ctp_report = report  # type: ignore[assignment]
    save_as_packed(model)
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Replace every PackedLinear by an nn.Linear that holds its unpacked weight, in place; return the model."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    if not packed:
        raise CTPError(f"{type(model).__name__} holds no packed layer to unpack")
    if packed == [model]:
        raise CTPError("the model is one packed layer, which cannot be replaced in place: use layer.packed.unpack()")
    for layer in packed:
        weight = nn.Parameter(layer.weight, requires_grad=False)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = weight
        linear.register_parameter("bias", layer.bias)
        linear.train(layer.training)
        _replace(model, layer, linear)
    from .checkpoints import METHOD, forget_packing

    for name in ("ctp_report", "save_pretrained"):
        vars(model).pop(name, None)
    if getattr(model, "quantization_method", None) == METHOD:
        forget_packing(model)
    return model


@dataclass
class Explanation:
    """Rows of `explain`: layer, format, shape, for each direction the backend and why others were passed over, and
    the rows of the launch, more than the layer's where it is fused with others; `plan_<direction>`: {rows of x: how}
    where the backend runs different numbers of rows differently."""

    rows: list[dict]

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            lines.append(f"{row['layer']:40} {row['shape']!s:16} {row['format']:20} "
                         f"forward {row['forward']:10} backward {row['backward']}")  # fmt: skip
        reasons = dict.fromkeys(
            f"  {row['format']} {way}: not {row['why_' + way]}"
            for row in self.rows
            for way in ("forward", "backward")
            if row["why_" + way]
        )
        plans = dict.fromkeys(
            f"  {row['format']} ({row['launch_rows']}, {row['shape'][1]}) {way}, {count} rows: {plan}"
            for row in self.rows
            for way in ("forward", "backward")
            for count, plan in row["plan_" + way].items()
        )
        return "\n".join([*lines, *reasons, *plans])

    def to_json(self) -> str:
        return json.dumps(self.rows, indent=2)


def explain(
    model: nn.Module, dtype: torch.dtype | None = None, *, device: str | None = None, rows: Sequence[int] = ()
) -> Explanation:
    """Which backend each packed layer runs on, forward and backward, for activations of `dtype`.

    `dtype` defaults to that of the model's first floating parameter, or else of the layer, `device` ("cpu" or "cuda",
    which need not be there: then by what needs no GPU to decide) to where the layers lie. `rows`: numbers of rows of x
    for which to say which backend runs them, and how; the backends named for a layer are those of one row.
    """
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    explained = []
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            shape = (layer.out_features, layer.in_features)
            group = layer.group
            launch_rows = shape[0] if group is None or group.tensors is None else sum(group.rows)
            row: dict = {"layer": name, "format": layer.format.name, "shape": shape, "launch_rows": launch_rows}
            activations = dtype or layer.dtype
            for direction in ("forward", "backward"):
                where = device or layer.packed.tensors[0].device.type
                compute = layer.compute if direction == "forward" else "exact"
                choice = choose(layer.format, shape, activations, where, direction, layer.backend, compute, 1)
                row[direction], row["why_" + direction] = choice.backend, choice.why
                row["plan_" + direction] = {}
                for m in rows:
                    asked = (layer.format, shape, activations, where, direction, layer.backend, compute, row_class(m))
                    taken = choose(*asked).backend
                    describe = getattr(load(taken), "describe", None)
                    if describe is not None:
                        how = describe(layer.format, (launch_rows, shape[1]), activations, m, direction)
                        row["plan_" + direction][m] = f"{taken}: {how}"
            explained.append(row)
    if not explained:
        raise CTPError(f"{type(model).__name__} holds no packed layer: call patch_model first")
    return Explanation(explained)


def _select(
    model: nn.Module, skip: Sequence[str], repacked: Collection[str] = ()
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    linears, skipped, used = {}, {}, set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in repacked:
            continue
        hits = [s for s in skip if name == s or name.endswith("." + s) or fnmatchcase(name, s)]
        used.update(hits)
        if hits:
            skipped[name] = f"named in skip ({hits[0]})"
        elif type(module) is not nn.Linear:
            skipped[name] = f"{type(module).__name__} is a subclass of Linear with a forward of its own"
        elif not module.weight.is_floating_point():
            skipped[name] = f"its weight is {module.weight.dtype}"
        else:
            linears[name] = module
    unused = [s for s in skip if s not in used and s not in DEFAULT_SKIP]
    if unused:
        raise CTPError(f"skip names no Linear layer of the model: {', '.join(unused)}")
    return linears, skipped


def _plan(linear: nn.Linear, asked: Format | None, backend: str, compute: str) -> Format:
    weight = linear.weight.detach()
    if not torch.isfinite(weight).all():
        raise CTPError("the weight holds NaN or infinite values, the checkpoint is damaged")
    shape = (weight.shape[0], weight.shape[1])
    format = (asked or _auto(weight)).with_dtype(weight.dtype)
    reason = format.constraint(shape)
    if reason:
        raise CTPError(f"{format} does not fit, {reason}")
    if not format.quantized and not torch.isfinite(weight.to(FLOAT_DTYPES[str(format.values)])).all():
        raise CTPError(f"the weight has values that {format.values} cannot hold")
    if backend != "auto" or compute != "exact":
        choose(format, shape, weight.dtype, weight.device.type, "forward", backend, compute)
    return format


def _auto(weight: torch.Tensor) -> Format:
    density = torch.count_nonzero(weight).item() / weight.numel()
    bits = weight.dtype.itemsize * 8
    if is_sparse24(weight):
        return parse_format("sparse24")
    if density * bits + 1 <= WORTHWHILE * bits:
        return parse_format("unstructured")
    return parse_format("int4")


def _layer_report(name: str, layer: PackedLinear, note: str) -> LayerReport:
    packed = layer.packed
    dense = packed.shape[0] * packed.shape[1] * packed.dtype.itemsize
    return LayerReport(name, packed.format.name, packed.shape, dense, packed.nbytes, note)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """In every place where the model holds `old`, for a module may be shared; hooks go along."""
    for name, value in vars(old).items():
        if name.startswith(("_forward", "_backward", "_is_full_backward")):
            vars(new)[name] = value  # the same dictionaries, so that a hook's handle still removes it
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, leaf, new)
