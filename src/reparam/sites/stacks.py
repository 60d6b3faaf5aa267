"""What stands for the stacked weights of experts while a module of experts computes with adapters.

A module of experts runs its own forward, with a `Stack` in the place of each stacked parameter. A stack is no tensor:
it takes part in torch's functions, and computes the products with the sites of the experts instead. So the routing, the
gates, biases and norms are those of the model, whatever its class.

    F.linear(x, stack[e])                x @ stack[e]                      one expert
    F.grouped_mm(x, stack, offs=ends)    torch.bmm(x [E, N, I], stack)     rows sorted by expert
    torch.bmm(stack[experts], x[..., None])                                a row for each entry of `experts`

In a mixed batch, a stack has a number for each expert with each adapter of the batch: with n names (or slots, or None
for the base), number e · n + i stands for expert e with the i-th of them. The module then sorts its rows by
both at once, and each expert's own matrix is still applied once to all its rows.

Shapes: E experts, O out_features, I in_features, S rows (pairs of a token and an expert).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from reparam.kernels.grouped import Group, Low, grouped_linear
from reparam.sites.expert import Choice, Expert, Part
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
    """One expert's matrix, with the update of one adapter, or of none."""

    def __init__(self, stack: Stack, number: int, outputs_last: bool, dtype: torch.dtype) -> None:
        self.stack, self.number, self.outputs_last, self.dtype = stack, number, outputs_last, dtype
        self.owner, self.device = stack.owner, stack.device

    def turned(self) -> Matrix:
        """The transposed matrix."""
        return Matrix(self.stack, self.number, not self.outputs_last, self.dtype)

    def to(self, dtype: torch.dtype) -> Matrix:
        """The matrix in another dtype."""
        return Matrix(self.stack, self.number, self.outputs_last, dtype)

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
        stack, (expert, name) = self.stack, self.stack.at(self.number)
        if self.dtype is not stack.dtype:
            update = expert.update_of(name)
            weight = DenseWeight(expert.frozen.tensor().to(self.dtype))
            return weight(x) if update is None else update(x, weight)
        groups = stack.groups([(self.number, 0, len(x))]) if x.ndim == 2 else None
        if groups is None:
            return expert.applied(x, name)
        return grouped_linear(x.to(stack.dtype), groups, expert.frozen.out_features)


class Picked(_Stands):
    """A matrix for each of S rows, [S, O, I] or [S, I, O]."""

    def __init__(self, stack: Stack, numbers: Tensor) -> None:
        self.stack, self.numbers = stack, numbers
        self.owner, self.outputs_last = stack.owner, stack.outputs_last

    def turned(self) -> Picked:
        """The transposed matrices."""
        return Picked(self.stack.turned(), self.numbers)

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
        stack = self.stack
        order = self.numbers.argsort(stable=True)
        ends = torch.bincount(self.numbers, minlength=len(stack)).cumsum(0)
        base = stack.parameter
        groups = None if base is None else stack.groups(stack.runs(ends))
        if base is None or groups is None:
            return stack.grouped(x[order], ends)[order.argsort()]
        # The product with the base is computed as the model computes it, so that a fresh adapter changes no bit.
        own = base[self.numbers if stack.names is None else self.numbers // len(stack.names)]
        x = x.to(stack.dtype)
        y = (
            torch.bmm(x.unsqueeze(1), own).squeeze(1)
            if self.outputs_last
            else torch.bmm(own, x.unsqueeze(2)).squeeze(2)
        )
        low = grouped_linear(x[order], [group._replace(weight=None) for group in groups], y.shape[1])
        return y + low[order.argsort()]


class Stack(_Stands):
    """The matrices of all experts, [E, O, I] or, with `outputs_last`, [E, I, O]; E · n of them with n `names`."""

    def __init__(
        self, owner: str, experts: Sequence[Expert], outputs_last: bool, names: Sequence[Choice] | None = None
    ) -> None:
        self.owner, self.experts, self.outputs_last, self.names = owner, experts, outputs_last, names
        weight = experts[0].frozen
        sizes = (weight.in_features, weight.out_features)
        self.shape = torch.Size((len(self), *(sizes if outputs_last else reversed(sizes))))
        self.dtype, self.device, self.ndim = weight.dtype, weight.device, 3
        self.requires_grad = False

    def __len__(self) -> int:
        return len(self.experts) * (1 if self.names is None else len(self.names))

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def data_ptr(self) -> int:
        """0: no address, which is aligned."""
        return 0

    def turned(self) -> Stack:
        """The transposed matrices."""
        return Stack(self.owner, self.experts, not self.outputs_last, self.names)

    def __getitem__(self, index: Any) -> Matrix | Picked:
        if isinstance(index, Tensor) and index.ndim == 1:
            return Picked(self, index)
        return Matrix(self, int(index), self.outputs_last, self.dtype)

    def at(self, number: int) -> tuple[Expert, Choice]:
        """The expert of a number, and the adapter or slot."""
        if self.names is None:
            expert = self.experts[number]
            return expert, expert.active
        number, name = divmod(number, len(self.names))
        return self.experts[number], self.names[name]

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
        if not all(type(expert._modules["frozen"]) is Part for expert in self.experts):
            return None
        whole: Tensor = self.experts[0].frozen.whole  # type: ignore[assignment]
        return whole if (self.experts[0].layout == "transposed") == self.outputs_last else whole.transpose(1, 2)

    def runs(self, ends: Tensor) -> list[tuple[int, int, int]]:
        """The numbers that have rows, each with its first row and the one after the last."""
        found, start = [], 0
        for number, stop in enumerate(ends.tolist()[: len(self)]):
            if stop > start:
                found.append((number, start, stop))
                start = stop
        return found

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [S, I], the rows of number i before ends[i] -> y [S, O]. Rows after the last end are zero."""
        runs, width = self.runs(ends), self.shape[2 if self.outputs_last else 1]
        if not runs:
            return x.new_zeros(len(x), width)
        groups = self.groups(runs)
        if groups is not None:
            return grouped_linear(x.to(self.dtype), groups, width)
        # One split, whose backward is one concatenation: slices would each make a gradient of full size.
        rest = len(x) - runs[-1][2]
        parts = x.split([stop - start for _, start, stop in runs] + ([rest] if rest else []))
        found = [self.at(number)[0].applied(part, self.at(number)[1]) for (number, _, _), part in zip(runs, parts)]  # noqa: B905
        return torch.cat([*found, found[0].new_zeros(rest, width)] if rest else found)

    def groups(self, runs: Sequence[tuple[int, int, int]]) -> list[Group] | None:
        """The groups for one op; None if an update is no product of two factors in this call, or dtypes differ."""
        device = self.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is not self.dtype:
            return None
        found: list[Group] = []
        whole: Tensor | None = None
        last: Expert | None = None
        for number, start, stop in runs:
            expert, name = self.at(number)
            update = None if name is None else expert.update_of(name)
            lows: list[Low] = []
            if update is not None:
                product = update.product()
                if product is None:
                    return None
                lows.append(Low(start, stop, *product))
            if expert is last:
                first = found[-1]
                found[-1] = Group(first.start, stop, first.weight, [*first.lows, *lows])
                continue
            frozen: Any = expert._modules["frozen"]
            if type(frozen) is Part:
                whole = frozen.whole if whole is None else whole
                own = whole[frozen.number]
                weight = own.t() if frozen.layout == "transposed" else own
            else:
                dense = frozen.dense_or_none
                weight = frozen.write if dense is None else dense
            found.append(Group(start, stop, weight, lows))
            last = expert
        return found
