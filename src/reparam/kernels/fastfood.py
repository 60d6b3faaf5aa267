"""Fastfood: a fixed random map P, R^d -> R^D, in O(D log n) time without storing P (Le, Sarlós & Smola 2013).

    P = [ H G_b Π_b H B_b / √(n Σ G_b²) ]  for the blocks b of n rows, cut to D rows and d columns, over √(D / n)

B_b are random signs, Π_b is a permutation (`(Π u)_j = u[Π_j]`), and G_b are N(0, 1). They are generated from a key each
time they are used (see `fastfood_tables`). The columns have norm 1 on average, and exactly if n divides D. The expected
|P x|² is |x|².

n = 2^⌈log₂ d⌉ gives the shortest possible blocks. One block of n = 2^⌈log₂ D⌉ gives the map in the released code of
Aghajanyan et al. 2020 (arXiv 2012.13255), but the gradient in that code is wrong: its backward pass divides each
transform by √n, so the gradient through each tensor is too small by a factor of n, and n differs between tensors. Here
the adjoint is Pᵀ g = Σ_b B_b H Π_bᵀ G_b H g_b / √(Σ G_b² D), without a further factor.

The two ops are each other's derivative and save nothing for backward. `fastfood_reference` is implemented in torch; the
compiled kernels of `fwht_cpu` are for float32 on a CPU and generate the same random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reparam.kernels.fastfood_tables import GAUSS_BITS, GOLDEN, MIX, ORDER_BITS, QUANTILES
from reparam.kernels.fwht import compiled, fwht, power_of_two

_NAME, _ADJOINT = "reparam::fastfood", "reparam::fastfood_adjoint"
_TAGS = torch.Tag.pt2_compliant_tag
torch.library.define(_NAME, "(Tensor x, int key, int n, int rows) -> Tensor", tags=_TAGS)
torch.library.define(_ADJOINT, "(Tensor g, int key, int n, int d) -> Tensor", tags=_TAGS)
_PIECE = 1 << 20
"""Random numbers that the torch reference generates at a time."""


def fastfood(x: Tensor, key: int, n: int, rows: int) -> Tensor:
    """x [d] -> P x [rows], in the dtype of x. `key`: an integer from 0 to 2^63 - 1; `n`: a power of two, at least d.

    Raises ValueError if x is not a floating-point vector, the key is negative, n is not such a power, or rows is below
    1.
    """
    return torch.ops.reparam.fastfood.default(x, key, n, rows)


def fastfood_adjoint(g: Tensor, key: int, n: int, d: int) -> Tensor:
    """g [D] -> Pᵀ g [d], in the dtype of g. Raises ValueError under the same conditions as `fastfood`."""
    return torch.ops.reparam.fastfood_adjoint.default(g, key, n, d)


def words(key: int, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """The hashes with numbers from `first` on, int64 [count]. The arithmetic is modulo 2^64, as int64 wraps around."""
    i = torch.arange(first + 1, first + count + 1, device=device)
    z = i * _signed(GOLDEN) + key
    z = (z ^ _right(z, 30)) * _signed(MIX[0])
    z = (z ^ _right(z, 27)) * _signed(MIX[1])
    return z ^ _right(z, 31)


def signs(hashes: Tensor) -> Tensor:
    """Random signs, 1 or -1, in float32, from bit 0 of each hash."""
    return 1.0 - 2.0 * (hashes & 1).float()


def normals(hashes: Tensor) -> Tensor:
    """N(0, 1) in float32, from bits 1 to 13 of each hash."""
    size = QUANTILES.to(hashes.device)[_right(hashes, 2) & ((1 << GAUSS_BITS) - 1)]
    return torch.where((hashes & 2).bool(), -size, size)


def orders(hashes: Tensor) -> Tensor:
    """hashes [b, n] -> a permutation of each row, int64 [b, n], from the highest 24 bits of each hash."""
    return _right(hashes, 64 - ORDER_BITS).argsort(dim=1, stable=True)


def apply(x: Tensor, B: Tensor, order: Tensor, G: Tensor, rows: int) -> Tensor:
    """P x [rows] in the dtype of x [d], for the given diagonals B and G and permutations `order`, all [blocks, n].

    >>> B, G, order = torch.tensor([[1.0, -1, 1, -1]]), torch.tensor([[1, 2, 0.5, 1]]), torch.tensor([[2, 0, 3, 1]])
    >>> [round(v, 4) for v in apply(torch.tensor([1.0, 2.0]), B, order, G, 3).tolist()]
    [0.3464, -0.1155, -1.7321]
    """
    padded = torch.nn.functional.pad(x, (0, B.shape[1] - len(x)))
    u = fwht(B.to(x.dtype) * padded)
    v = fwht(G.to(x.dtype) * u.gather(1, order))
    return (v * _scale(G, rows).to(x.dtype)).flatten()[:rows]


def apply_adjoint(g: Tensor, B: Tensor, order: Tensor, G: Tensor, d: int, rows: int) -> Tensor:
    """Pᵀ g [d] for these blocks [blocks, n] of P: g holds their rows, and `rows` is the number of rows of P."""
    blocks, n = B.shape
    padded = torch.nn.functional.pad(g, (0, blocks * n - len(g))).view(blocks, n)
    v = fwht(padded) * G.to(g.dtype) * _scale(G, rows).to(g.dtype)
    u = fwht(torch.zeros_like(v).scatter_(1, order, v))
    return (u * B.to(g.dtype))[:, :d].sum(0)


def fastfood_reference(x: Tensor, key: int, n: int, rows: int) -> Tensor:
    """`fastfood` in torch, a few blocks at a time."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    found = torch.cat([_part(wide, *drawn, rows) for _, drawn in _blocks(key, n, rows, x.device)])
    return found[:rows].to(x.dtype)


def fastfood_adjoint_reference(g: Tensor, key: int, n: int, d: int) -> Tensor:
    """`fastfood_adjoint` in torch, a few blocks at a time."""
    wide = g.to(torch.promote_types(g.dtype, torch.float32))
    total = wide.new_zeros(d)
    for part, drawn in _blocks(key, n, len(g), g.device):
        total += apply_adjoint(wide[part], *drawn, d, len(g))
    return total.to(g.dtype)


def _part(x: Tensor, B: Tensor, order: Tensor, G: Tensor, rows: int) -> Tensor:
    """All rows of these blocks, scaled as part of a map with `rows` rows."""
    return apply(x, B, order, G, B.numel()) * (B.numel() / rows) ** 0.5


def _blocks(key: int, n: int, rows: int, device: torch.device) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor]]]:
    """Groups of blocks: their rows of P, and their B, permutation and G, [b, n] each."""
    count, size = -(-rows // n), max(1, _PIECE // n)
    for first in range(0, count, size):
        last = min(first + size, count)
        hashes = words(key, first * n, (last - first) * n, device).view(-1, n)
        yield slice(first * n, min(last * n, rows)), (signs(hashes), orders(hashes), normals(hashes))


def _scale(G: Tensor, rows: int) -> Tensor:
    """1 / (√(n Σ G²) √(rows / n)) of each block, [b, 1] float64."""
    return (G.double().square().sum(1, keepdim=True) * rows).rsqrt()


def _right(z: Tensor, bits: int) -> Tensor:
    """A logical right shift (zeros enter at the left), which torch does not have for int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _check(x: Tensor, key: int, n: int, d: int, rows: int) -> None:
    if not x.is_floating_point() or x.ndim != 1:
        raise ValueError(f"fastfood: expected a vector of floating-point numbers, got {x.dtype} {list(x.shape)}")
    if key < 0:
        raise ValueError(f"fastfood: key={key}: expected an integer from 0 to 2^63 - 1")
    if n != power_of_two(n) or not 1 <= d <= n or rows < 1:
        raise ValueError(
            f"fastfood: d={d}, n={n}, D={rows}: expected n to be a power of two of at least d, and d and D to be at "
            f"least 1; a shorter block would ignore the end of the vector"
        )


def _fast(x: Tensor) -> Any:
    """The compiled kernels if they support the dtype and device of x, otherwise None."""
    return compiled() if x.dtype is torch.float32 and x.device.type == "cpu" else None


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _forward(x: Tensor, key: int, n: int, rows: int) -> Tensor:
    _check(x, key, n, len(x), rows)
    kernels = _fast(x)
    if kernels is None:
        return fastfood_reference(x, key, n, rows)
    out = x.new_empty(rows)
    kernels.fastfood(out, x.contiguous(), key, n)
    return out


@torch.library.impl(_ADJOINT, "CompositeExplicitAutograd")
def _adjoint(g: Tensor, key: int, n: int, d: int) -> Tensor:
    _check(g, key, n, d, len(g))
    kernels = _fast(g)
    if kernels is None:
        return fastfood_adjoint_reference(g, key, n, d)
    return kernels.fastfood_adjoint(g.contiguous(), key, n, d)


torch.library.register_fake(_NAME, lambda x, key, n, rows: x.new_empty(rows))
torch.library.register_fake(_ADJOINT, lambda g, key, n, d: g.new_empty(d))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    vector, ctx.key, ctx.n, _ = inputs
    ctx.size = vector.shape[0]


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
    return fastfood_adjoint(g, ctx.key, ctx.n, ctx.size), None, None, None


def _differentiate_adjoint(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
    return fastfood(g, ctx.key, ctx.n, ctx.size), None, None, None


torch.library.register_autograd(_NAME, _differentiate, setup_context=_keep)
torch.library.register_autograd(_ADJOINT, _differentiate_adjoint, setup_context=_keep)
