"""What stands for the stacked weights of experts while a module of experts computes with adapters.

A module of experts runs its own forward, with a `Stack` in the place of each stacked parameter. A stack is no tensor:
it takes part in torch's functions, and computes the products with the sites of the experts instead. So the routing, the
gates, biases and norms are those of the model, whatever its class.

    F.linear(x, stack[e])                x @ stack[e]                      one expert
    F.grouped_mm(x, stack, offs=ends)    torch.bmm(x [E, N, I], stack)     rows sorted by expert
    torch.bmm(stack[experts], x[..., None])                                a row for each entry of `experts`

Shapes: E experts, O out_features, I in_features, S rows (pairs of a token and an expert).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from reparam.core.base import Update
from reparam.kernels.grouped import Group, grouped_linear
from reparam.sites.expert import Expert, Part
from reparam.weights.dense import DenseWeight


class _Stands:
    """Stands for a tensor in the functions of torch: `product(x)` is what a function of it computes."""

    owner: str
    """The class that computes, for messages."""
    outputs_last: bool
    """Whether the last dimension of the tensor that this stands for is O."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self = next(arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, _Stands))
        found = self.computed(getattr(function, "__name__", str(function)).removeprefix("_"), args, kwargs or {})
        if found is None:
            raise ValueError(
                f"{self.owner} computes with the stacked weights of its experts by {function}, where no update can "
                f"act; leave its experts out of the targets, or dequantize them"
            )
        return found

    def computed(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The result of this function of torch; None if it is not known."""
        raise NotImplementedError

    def turned(self) -> Self:
        """What stands for the tensor with its last two dimensions exchanged."""
        raise NotImplementedError

    @property
    def T(self) -> Self:  # noqa: N802  (as of a tensor)
        return self.turned()

    @property
    def mT(self) -> Self:  # noqa: N802  (as of a tensor)
        return self.turned()

    def t(self) -> Self:
        return self.turned()

    def transpose(self, one: int, other: int) -> Self:
        """The last two dimensions exchanged; no others can be."""
        if {one, other} not in ({-1, -2}, {1, 2}, {0, 1}):
            raise ValueError(f"{self.owner}: cannot exchange the dimensions {one} and {other} of experts with adapters")
        return self.turned()


class Matrix(_Stands):
    """One expert's matrix."""

    def __init__(self, owner: str, expert: Expert, outputs_last: bool, dtype: torch.dtype | None = None) -> None:
        self.owner, self.expert, self.outputs_last = owner, expert, outputs_last
        self.dtype = expert.frozen.dtype if dtype is None else dtype
        self.device = expert.frozen.device

    def turned(self) -> Matrix:
        """The transposed matrix."""
        return Matrix(self.owner, self.expert, not self.outputs_last, self.dtype)

    def to(self, dtype: torch.dtype) -> Matrix:
        """The matrix in another dtype."""
        return Matrix(self.owner, self.expert, self.outputs_last, dtype)

    def float(self) -> Matrix:
        """The matrix in float32."""
        return self.to(torch.float32)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self._product(x)

    def computed(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """A product of rows [N, I] with the matrix."""
        if name == "linear" and args[1] is self and not self.outputs_last:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            y = self._product(args[0])
            return y if bias is None else y + bias
        if name in ("matmul", "mm", "_matmul__", "__matmul__") and args[1] is self and self.outputs_last:
            return self._product(args[0])
        return None

    def _product(self, x: Tensor) -> Tensor:
        expert = self.expert
        if self.dtype is expert.frozen.dtype:
            return expert(x)
        weight = DenseWeight(expert.frozen.tensor().to(self.dtype))
        return weight(x) if expert.active is None else expert.updates[expert.active](x, weight)


class Picked(_Stands):
    """A matrix for each of S rows, [S, O, I] or [S, I, O]."""

    def __init__(self, stack: Stack, experts: Tensor) -> None:
        self.stack, self.experts = stack, experts
        self.owner, self.outputs_last = stack.owner, stack.outputs_last

    def turned(self) -> Picked:
        """The transposed matrices."""
        return Picked(self.stack.turned(), self.experts)

    def computed(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Products of one row with each matrix."""
        if name != "bmm":
            return None
        left, right = args
        if right is self and self.outputs_last and left.shape[1] == 1:
            return self._product(left.squeeze(1)).unsqueeze(1)
        if left is self and not self.outputs_last and right.shape[2] == 1:
            return self._product(right.squeeze(2)).unsqueeze(2)
        return None

    def _product(self, x: Tensor) -> Tensor:
        order = self.experts.argsort(stable=True)
        ends = torch.bincount(self.experts, minlength=len(self.stack.experts)).cumsum(0)
        base = self.stack.parameter
        hit = self.stack.hit(ends)
        groups = None if base is None else _fast(hit)
        if base is None or groups is None:
            return self.stack.grouped(x[order], ends)[order.argsort()]
        # The product with the base is computed as the model computes it, so that a fresh adapter changes no bit.
        own = base[self.experts]
        x = x.to(self.stack.dtype)
        y = (
            torch.bmm(x.unsqueeze(1), own).squeeze(1)
            if self.outputs_last
            else torch.bmm(own, x.unsqueeze(2)).squeeze(2)
        )
        low = grouped_linear(x[order], [group._replace(weight=None) for group in groups], y.shape[1])
        return y + low[order.argsort()]


class Stack(_Stands):
    """The matrices of all experts, [E, O, I] or, with `outputs_last`, [E, I, O]."""

    def __init__(self, owner: str, experts: Sequence[Expert], outputs_last: bool) -> None:
        self.owner, self.experts, self.outputs_last = owner, experts, outputs_last
        weight = experts[0].frozen
        sizes = (weight.in_features, weight.out_features)
        self.shape = torch.Size((len(experts), *(sizes if outputs_last else reversed(sizes))))
        self.dtype, self.device, self.ndim = weight.dtype, weight.device, 3
        self.requires_grad = False

    def __len__(self) -> int:
        return len(self.experts)

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def data_ptr(self) -> int:
        """0: no address, which is aligned."""
        return 0

    def turned(self) -> Stack:
        """The transposed matrices."""
        return Stack(self.owner, self.experts, not self.outputs_last)

    def __getitem__(self, index: Any) -> Matrix | Picked:
        if isinstance(index, Tensor) and index.ndim == 1:
            return Picked(self, index)
        return Matrix(self.owner, self.experts[int(index)], self.outputs_last)

    def computed(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Products of rows that are sorted by expert."""
        if len(args) < 2 or args[1] is not self or not self.outputs_last:
            return None
        if name in ("grouped_mm", "transformers.grouped_mm_fallback"):
            return self.grouped(args[0], kwargs["offs"] if "offs" in kwargs else args[2])
        if name == "bmm":
            x = args[0]
            ends = torch.arange(1, len(x) + 1) * x.shape[1]
            return self.grouped(x.reshape(-1, x.shape[-1]), ends).view(*x.shape[:2], -1)
        return None

    @property
    def parameter(self) -> Tensor | None:
        """The stacked parameter, with its dimensions in this order; None where experts have weights of their own."""
        parts = [expert.frozen for expert in self.experts]
        if not all(isinstance(part, Part) for part in parts):
            return None
        whole: Tensor = parts[0].whole  # type: ignore[assignment]
        return whole if (self.experts[0].layout == "transposed") == self.outputs_last else whole.transpose(1, 2)

    def hit(self, ends: Tensor) -> list[tuple[Expert, int, int]]:
        """The experts that have rows, with the first row and the one after the last."""
        found, start = [], 0
        for expert, stop in zip(self.experts, ends.tolist(), strict=False):
            if stop > start:
                found.append((expert, start, stop))
                start = stop
        return found

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [S, I], the rows of expert e before ends[e] -> y [S, O]. Rows after the last end are zero."""
        hit, width = self.hit(ends), self.shape[2 if self.outputs_last else 1]
        if not hit:
            return x.new_zeros(len(x), width)
        groups = _fast(hit)
        if groups is not None:
            return grouped_linear(x.to(self.dtype), groups, width)
        found = [expert(x[first:last]) for expert, first, last in hit]
        if (end := hit[-1][2]) < len(x):
            found.append(found[0].new_zeros(len(x) - end, width))
        return torch.cat(found)


def _fast(hit: Sequence[tuple[Expert, int, int]]) -> list[Group] | None:
    """The groups for one op, if all weights are dense and all updates are a product of two factors in this call."""
    groups: list[Group] = []
    if not hit or torch.is_autocast_enabled(hit[0][0].frozen.device.type):
        return None
    for expert, start, stop in hit:
        weight, factors = expert.frozen.dense_or_none, None
        if expert.active is not None:
            update: Update = expert.updates[expert.active]  # type: ignore[assignment]
            factors = update.product()
            if factors is None:
                return None
        if weight is None:
            return None
        groups.append(Group(start, stop, weight, factors))
    return groups
