"""The two operators, registered with torch.library: `ctp::matmul` and `ctp::matmul_t`.

    ctp::matmul(x (..., K), packed, bias (N,)?, format, n, backend, compute="exact") -> y (..., N) = x W^T + bias
    ctp::matmul_t(dy (..., N), packed, format, k, backend) -> dx (..., K) = dy W

`packed` lists the buffers of the weight in the order of `format.kernel_names`. Each operator is the other's
backward with respect to the activations; the packed weight is frozen and has no gradient. The backward keeps
nothing but the packed buffers. With compute="int8" (see `backends.COMPUTE`) the backward is that of the exact
product.

Layers call a `Product`, which leaves the operator out where nobody listens in between (`quiet`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from .backends import choose, load, row_class
from .format import Format, parse_format

_LIB = torch.library.Library("ctp", "DEF")
_LIB.define(
    'matmul(Tensor x, Tensor[] packed, Tensor? bias, str format, int n, str backend, str compute="exact") -> Tensor'
)
_LIB.define("matmul_t(Tensor dy, Tensor[] packed, str format, int k, str backend) -> Tensor")


def _kernel(
    format: Format, shape: tuple[int, int], x: torch.Tensor, direction: str, backend: str, compute: str = "exact"
) -> Callable[..., torch.Tensor]:
    rows = row_class(x.numel() // max(x.shape[-1], 1))
    module = load(choose(format, shape, x.dtype, x.device.type, direction, backend, compute, rows).backend)
    return module.matmul if direction == "forward" else module.matmul_t


@torch.library.impl(_LIB, "matmul", "CompositeExplicitAutograd")
def _matmul(
    x: torch.Tensor,
    packed: list[torch.Tensor],
    bias: torch.Tensor | None,
    format: str,
    n: int,
    backend: str,
    compute: str = "exact",
) -> torch.Tensor:
    fmt, k = parse_format(format), x.shape[-1]
    y = _kernel(fmt, (n, k), x, "forward", backend, compute)(x.reshape(-1, k), packed, fmt, n, bias, compute)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], n)


@torch.library.impl(_LIB, "matmul_t", "CompositeExplicitAutograd")
def _matmul_t(dy: torch.Tensor, packed: list[torch.Tensor], format: str, k: int, backend: str) -> torch.Tensor:
    fmt, n = parse_format(format), dy.shape[-1]
    run = _kernel(fmt, (n, k), dy, "backward", backend)
    return run(dy.reshape(-1, n), packed, fmt, k).view(*dy.shape[:-1], k)


@torch.library.register_fake("ctp::matmul", lib=_LIB)
def _(x, packed, bias, format, n, backend, compute="exact"):
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("ctp::matmul_t", lib=_LIB)
def _(dy, packed, format, k, backend):
    return dy.new_empty((*dy.shape[:-1], k))


def _keep(ctx, inputs, output) -> None:
    x, packed, _, ctx.format, _, ctx.backend, _ = inputs
    ctx.width = x.shape[-1]
    ctx.save_for_backward(*packed)


def _keep_t(ctx, inputs, output) -> None:
    dy, packed, ctx.format, _, ctx.backend = inputs
    ctx.width = dy.shape[-1]
    ctx.save_for_backward(*packed)


def _matmul_backward(ctx, dy):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.ctp.matmul_t(dy, list(ctx.saved_tensors), ctx.format, ctx.width, ctx.backend)
    if ctx.needs_input_grad[2]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    rest = len(ctx.needs_input_grad) - 3  # one less where the caller left `compute` at its default
    return dx, [None] * len(ctx.saved_tensors), dbias, *[None] * rest


def _matmul_t_backward(ctx, ddx):
    ddy = torch.ops.ctp.matmul(ddx, list(ctx.saved_tensors), None, ctx.format, ctx.width, ctx.backend)
    return ddy, [None] * len(ctx.saved_tensors), None, None, None


torch.library.register_autograd("ctp::matmul", _matmul_backward, setup_context=_keep, lib=_LIB)
torch.library.register_autograd("ctp::matmul_t", _matmul_t_backward, setup_context=_keep_t, lib=_LIB)


_keys = torch._C._dispatch_tls_local_include_set
#: What `_keys` holds outside and inside inference mode where nobody listens: no tracer, vmap, fake tensor or mode.
_QUIET = {
    keys.raw_repr()
    for keys in (
        torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect),
        torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(torch._C.DispatchKey.ADInplaceOrView),
    )
}


def quiet(x: torch.Tensor) -> bool:
    """Whether this is plain eager code without gradients: the operator may be left out of a call."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and (x.is_cpu or x.is_cuda)
        and _keys().raw_repr() in _QUIET
        and not torch.autograd.profiler._is_profiler_enabled
    )


def bind(
    x: torch.Tensor, packed: list[torch.Tensor], format: Format, n: int, backend: str, compute: str
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """(x, bias) -> y for this weight and for activations like x: the operator's kernel, for where it is `quiet`.

    The operator costs 15 to 80 us a call (the more the colder the caches), a token's layer as little as 30 us on a CPU
    and 6 us on a GPU.
    """
    k = x.shape[-1]
    asked = (format, (n, k), x.dtype, x.device.type, "forward", backend, compute)
    name = choose(*asked).backend
    module = load(name)

    def unbound(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _matmul(x, packed, bias, format.name, n, backend, compute)

    if not hasattr(module, "bind") or any(tensor.device != x.device for tensor in packed):
        return unbound  # which says it where devices differ
    run = module.bind(packed, format, n, k, compute)
    if not hasattr(module, "slower"):
        return run

    @cache
    def fastest(rows: int) -> bool:
        return choose(*asked, rows).backend == name

    return lambda x, bias: (run if fastest(row_class(x.numel() // k)) else unbound)(x, bias)


class Product:
    """y = x W^T + bias for one weight: the operator, or, where it is `quiet`, what its last such call was bound to."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        #: What it was bound for, the kernel, and the tensors, so that their addresses stay theirs.
        self._bound: tuple[tuple, Callable[..., torch.Tensor], list[torch.Tensor]] | None = None

    def __call__(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        format: Format,
        n: int,
        backend: str,
        compute: str,
    ) -> torch.Tensor:
        if not quiet(x):
            return torch.ops.ctp.matmul(x, tensors, bias, format.name, n, backend, compute)
        kept = (x.dtype, x.device, format, backend, compute, *[t.data_ptr() for t in tensors])
        bound = self._bound  # one look: another thread may bind it to something else
        if bound is None or bound[0] != kept:
            bound = self._bound = kept, bind(x, tensors, format, n, backend, compute), tensors
        return bound[1](x, bias)

    def __reduce__(self) -> tuple:
        return Product, ()  # a copy of a layer binds anew
