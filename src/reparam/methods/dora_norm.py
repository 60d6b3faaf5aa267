"""Squared norms ‖W₀ + B A‖² of rows or columns, from the factors, without building ΔW or a dense W₀.

    rows       n² = ‖W₀‖² + 2 rowsum((W₀ Aᵀ) ∘ B) + rowsum((B (A Aᵀ)) ∘ B)
    columns    n² = ‖W₀‖² + 2 colsum((Bᵀ W₀) ∘ A) + colsum(((Bᵀ B) A) ∘ A)

B includes the scale s, and ‖W₀‖² is computed only once. For rows, W₀ is applied to the R rows of A only, which costs as
much as R more tokens in the frozen layer. Where ΔW nearly cancels W₀, the sum of the terms is too inexact, and the
norms of those rows or columns are computed directly.

Shapes: O out_features, I in_features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reparam.core.base import Weight
from reparam.core.dtypes import valueless

_LEAST = 1e-3
"""A norm is computed directly if its terms sum to less than this share of their sizes (16 eps for 16-bit weights)."""
_BLOCK = 1 << 18  # entries of W in one block of rows of a direct computation: 2 MiB in float64


def of_rows(weight: Weight, A: Tensor, B: Tensor, squares: Tensor) -> Tensor:
    """‖W + B A‖² of each row [O] in float64, from A [R, I], B [O, R] and ‖W‖² [O]."""
    product = weight(weight.cast(A)).double()  # [R, O]
    a, b = A.double(), B.double()  # in float64, because the sum of the terms may be far smaller than each of them
    cross = 2 * (product.t() * b).sum(1)
    own = (b @ (a @ a.t()) * b).sum(1)
    total, ids = _sum(squares, cross, own, weight)
    if ids is None or not len(ids):
        return total
    size = max(1, _BLOCK // weight.in_features)
    direct = [(weight.rows(some).double() + b[some] @ a).square().sum(1) for some in ids.split(size)]
    return total.index_put((ids,), torch.cat(direct))


def of_columns(weight: Weight, A: Tensor, B: Tensor, squares: Tensor) -> Tensor:
    """‖W + B A‖² of each column [I] in float64, from A [R, I], B [O, R] and ‖W‖² [I]; W is read in blocks of rows."""
    product = torch.zeros_like(A)  # Bᵀ W
    for rows, block in weight.blocks():
        product = product + B[rows].t() @ block.to(A.dtype)
    a, b = A.double(), B.double()
    cross = 2 * (product.double() * a).sum(0)
    own = ((b.t() @ b) @ a * a).sum(0)
    total, ids = _sum(squares, cross, own, weight)
    if ids is None or not len(ids):
        return total
    direct = torch.zeros_like(total[ids])
    for rows, block in weight.blocks():
        direct = direct + (block[:, ids].double() + b[rows] @ a[:, ids]).square().sum(0)
    return total.index_put((ids,), direct)


def _sum(squares: Tensor, cross: Tensor, own: Tensor, weight: Weight) -> tuple[Tensor, Tensor | None]:
    """The sum of the three terms [L] in float64, and the indices where they nearly cancel.

    A compiled graph cannot branch on the indices: it gets None, and raises an error at run time if any terms cancel.
    """
    total = squares + cross + own
    least = max(_LEAST, 16 * torch.finfo(weight.dtype).eps)
    near = total < least * (squares + cross.abs() + own)
    if valueless(near):
        return total, None
    if not torch.compiler.is_compiling():
        return total, near.nonzero().flatten()
    torch._assert_async(~near.any(), "DoRA: an update nearly cancels a row of W; run the model without torch.compile")
    return total, None
