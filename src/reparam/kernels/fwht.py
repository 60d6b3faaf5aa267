"""The fast Walsh-Hadamard transform over the last dimension: unnormalized, in natural (Sylvester) order.

    H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]],  y = H x        H = Hᵀ, H H = n I

It costs n log₂ n additions. `fwht_reference` is implemented in torch, for any device and floating-point dtype; the
compiled kernel of `fwht_cpu` is for float32 on a CPU. The derivative is the same transform of the gradient, so nothing
is saved for backward.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_NAME = "reparam::fwht"
torch.library.define(_NAME, "(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def fwht(x: Tensor) -> Tensor:
    """x [..., n] of a floating-point dtype -> H x [..., n] in the same dtype. 16-bit numbers are summed in float32.

    Raises ValueError if n is not a power of two, or if the dtype is not floating-point.

    >>> fwht(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    [10.0, -2.0, -4.0, 0.0]
    """
    return torch.ops.reparam.fwht.default(x)


def backend() -> str:
    """The backend for float32 on a CPU: "numba", or "torch" if numba cannot be imported. Loads the kernel."""
    return "torch" if compiled() is None else "numba"


def fwht_reference(x: Tensor) -> Tensor:
    """`fwht` in torch, one butterfly stage (a pass over memory) at a time."""
    n = x.shape[-1]
    y = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, n)
    h = 1
    while h < n:
        a, b = y.view(-1, n // (2 * h), 2, h).unbind(2)
        y = torch.stack([a + b, a - b], 2).view(-1, n)
        h *= 2
    y = y.view(x.shape).to(x.dtype)
    return y.clone() if n == 1 else y  # an op's result shares no memory with its argument


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`.

    >>> power_of_two(5), power_of_two(8), power_of_two(1)
    (8, 8, 1)
    """
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def compiled() -> ModuleType | None:
    """The compiled kernels, or None if numba cannot be imported. Imported at first use, because that is slow."""
    try:
        from reparam.kernels import fwht_cpu
    except (ImportError, OSError):  # OSError: llvmlite is installed, but its shared library is missing
        return None
    return fwht_cpu


def _check(x: Tensor) -> None:
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] < 1 or x.shape[-1] & (x.shape[-1] - 1):
        raise ValueError(
            f"fwht: expected floating-point numbers [..., n] with n a power of two, got {str(x.dtype)[6:]} "
            f"{list(x.shape)}; pad the last dimension with zeros to the next power of two"
        )


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _any_device(x: Tensor) -> Tensor:
    _check(x)
    return fwht_reference(x)


@torch.library.impl(_NAME, "CPU")
def _cpu(x: Tensor) -> Tensor:
    _check(x)
    kernels = compiled() if x.dtype is torch.float32 else None
    if kernels is None:
        return fwht_reference(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        kernels.fwht(out.view(-1, x.shape[-1]), x.view(-1, x.shape[-1]))
    return out


@torch.library.register_fake(_NAME)
def _fake(x: Tensor) -> Tensor:
    _check(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(ctx: Any, g: Tensor) -> Tensor:
    return fwht(g)


torch.library.register_autograd(_NAME, _backward)
