"""The op of mixed batches: apply each batch row's own low-rank factors, in place on the output of the base map.

The factors of all slots are end to end in two tables. `spans[s]` = (a, b, n, g) tells where slot s has its own: n rows
of A from row a, n rows of B_t from row b, and row g of the gains (-1 for none). For a row of the batch with slot
s = slots[row] >= 0:

    y[row] = gain[g] ∘ y[row] + (x[row] A[a : a + n]ᵀ) B_t[b : b + n]

This applies the normal form `W' = diag(gain) · W + B · A` to rows whose `y[row] = W x[row]` (without bias) is given.
Rows with slot -1 do not change. Rows of the tables that no row of the batch uses never affect a result, even if they
contain NaN.

There are three implementations. `update_by_row_` and `update_by_slot_` use torch; they support any device and dtype and
are differentiable. The compiled kernel of `rows_cpu` is for contiguous float32 on a CPU; with it, the result of a row
is bitwise independent of the other rows. `backend()` tells whether the compiled kernel is available.

Shapes: B rows of the batch, T tokens in a row, I in_features, O out_features, S slots, M and N rows of the tables, G
gains, R largest rank of the slots in use (`most`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from reparam.kernels.packs import Step, Tables

_NAME = "reparam::bank_update_"
torch.library.define(
    _NAME,
    "(Tensor(a!) y, Tensor x, Tensor slots, Tensor A, Tensor B_t, Tensor spans, int most, Tensor? gain=None) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


def bank_update_(
    y: Tensor,  # [B, T, O]
    x: Tensor,  # [B, T, I]
    slots: Tensor,  # [B] int64, -1 for no adapter
    A: Tensor,  # [M, I]
    B_t: Tensor,  # [N, O], B transposed, including the scale
    spans: Tensor,  # [S, 4] int64: first row in A, first row in B_t, rank, row in gain or -1
    most: int,  # R, at least the rank of each slot in use
    gain: Tensor | None = None,  # [G, O]
) -> None:
    """Scale each row of `y` by its gain and add its low-rank product, in place. `y` shares no memory with the rest.

    `torch.compile` sees one op. If an argument requires gradients, a torch reference runs instead, which is
    differentiable in all arguments; the op itself is for inference.

    Raises ValueError if shapes do not match, if `slots` or `spans` is not int64 or, on a CPU, if a slot is outside the
    bank, or its span outside the tables or above `most`; `y` is then unchanged. On other devices, a slot outside the
    bank is an indexing error.

    >>> A, B_t = torch.ones(2, 3), torch.ones(2, 4)  # one slot of rank 2
    >>> y = torch.zeros(2, 1, 4)
    >>> bank_update_(y, torch.ones(2, 1, 3), torch.tensor([0, -1]), A, B_t, torch.tensor([[0, 0, 2, -1]]), most=2)
    >>> y[:, 0].tolist()
    [[6.0, 6.0, 6.0, 6.0], [0.0, 0.0, 0.0, 0.0]]
    """
    if torch.is_grad_enabled() and (
        x.requires_grad
        or y.requires_grad
        or A.requires_grad
        or B_t.requires_grad
        or (gain is not None and gain.requires_grad)
    ):
        _check(y, x, slots, A, B_t, spans, gain)
        # A loop over the slots in use depends on data, which a traced graph does not support.
        looped = y.device.type == "cpu" and not torch.compiler.is_compiling()
        (update_by_slot_ if looped else update_by_row_)(y, x, slots, A, B_t, spans, most, gain)
    else:
        torch.ops.reparam.bank_update_.default(y, x, slots, A, B_t, spans, most, gain)


def packed_update_(
    y: Tensor,  # [N, O], or with further dimensions of size 1
    x: Tensor,  # [N, I], the same
    step: Step,
    tables: Tables,
    most: int,
) -> bool:
    """Like `bank_update_`, for rows of any lengths that are end to end.

    False, with `y` unchanged, unless the compiled kernel can compute it: contiguous float32 on a CPU, without autograd.
    Raises ValueError if the shapes do not match, and for invalid slots and spans.
    """
    single = torch.float32
    if (
        not tables.compiled
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not y.dtype is x.dtype is single
        or type(y) is not Tensor
        or not (y.is_contiguous() and x.is_contiguous())
    ):
        return False
    kernel = _compiled_packed()
    if kernel is None:
        return False
    inputs, outputs = tables.widths
    if x.numel() != step.total * inputs or y.numel() != step.total * outputs:
        raise ValueError(
            f"packed_update_: the step has {step.total} tokens, and the tables are for {inputs} inputs and {outputs} "
            f"outputs, but x is {list(x.shape)} and y {list(y.shape)}"
        )
    if not kernel(y, x, step, tables, most):
        A, B_t, spans, gain = tables.all
        _check_spans(step.slots, A, B_t, spans, most, gain)
    if not y.is_inference():
        torch.autograd.graph.increment_version(y)  # autograd does not see the kernel's write
    return True


def backend() -> str:
    """The backend for float32 on a CPU: "numba", or "torch" if numba cannot be imported. Loads the kernel."""
    return "torch" if _compiled() is None else "numba"


def update_by_row_(
    y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, spans: Tensor, most: int, gain: Tensor | None = None
) -> None:
    """The reference for accelerators and traced graphs: gather the factors of each row, then two batched products.

    Its shapes are static and it does not synchronize. On a CPU, copying factors for each row costs more than the
    products.
    """
    if not len(spans):  # an empty bank: every row uses the base model
        return
    active = slots >= 0
    own = spans[slots.clamp(min=0)]  # [B, 4]
    rank = torch.where(active, own[:, 2], 0)[:, None]
    steps = torch.arange(most, device=y.device)
    beyond = steps >= rank  # [B, R]
    down, up = (
        # NaN in another slot's rows must not affect the result.
        table[torch.where(beyond, 0, own[:, column, None] + steps)].masked_fill(beyond.unsqueeze(2), 0)
        for column, table in enumerate((A, B_t))
    )
    delta = torch.bmm(torch.bmm(x.to(A.dtype), down.mT), up)
    kept = y
    if gain is not None and len(gain):
        # The gradient of the gain needs the old y, which is overwritten below.
        before = y.clone() if gain.requires_grad and torch.is_grad_enabled() else y
        scaled = (active & (own[:, 3] >= 0))[:, None]
        kept = before * torch.where(scaled, gain[own[:, 3].clamp(min=0)], 1).unsqueeze(1)
    y.copy_(torch.where(active[:, None, None], kept + delta, y))


def update_by_slot_(
    y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, spans: Tensor, most: int, gain: Tensor | None = None
) -> None:
    """The reference for a CPU: two products for each slot in use, with its factors in place."""
    _check_spans(slots, A, B_t, spans, most, gain)
    for slot in slots.unique().tolist():
        if slot < 0:
            continue
        rows = (slots == slot).nonzero().squeeze(1)
        a, b, rank, scale = spans[slot].tolist()
        new = y.index_select(0, rows)
        if gain is not None and scale >= 0:
            new = new * gain[scale]
        new = new + (x.index_select(0, rows).to(A.dtype) @ A[a : a + rank].mT) @ B_t[b : b + rank]
        y.index_copy_(0, rows, new.to(y.dtype))


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _any_device(
    y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, spans: Tensor, most: int, gain: Tensor | None = None
) -> None:
    _check(y, x, slots, A, B_t, spans, gain)
    update_by_row_(y, x, slots, A, B_t, spans, most, gain)


@torch.library.impl(_NAME, "CPU")
def _cpu(
    y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, spans: Tensor, most: int, gain: Tensor | None = None
) -> None:
    _check(y, x, slots, A, B_t, spans, gain)
    single = torch.float32
    plain = y.dtype is x.dtype is A.dtype is B_t.dtype is single and (gain is None or gain.dtype is single)
    kernel = _compiled() if plain and y.is_contiguous() else None
    if kernel is None:
        update_by_slot_(y, x, slots, A, B_t, spans, most, gain)
        return
    gain = gain if gain is None else gain.contiguous()
    operands = (x.contiguous(), slots.contiguous(), A.contiguous(), B_t.contiguous(), spans.contiguous())
    if not kernel(y, *operands, most, gain):
        _check_spans(slots, A, B_t, spans, most, gain)
    torch.autograd.graph.increment_version(y)  # autograd does not see the kernel's write


@torch.library.register_fake(_NAME)
def _fake(
    y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, spans: Tensor, most: int, gain: Tensor | None = None
) -> None:
    _check(y, x, slots, A, B_t, spans, gain)


@functools.cache
def _compiled() -> Callable[..., bool] | None:
    """The compiled kernel, or None if numba cannot be imported. Imported at first use, because that is slow."""
    try:
        from reparam.kernels.rows_cpu import run
    except (ImportError, OSError):  # OSError: llvmlite is installed, but its shared library is missing
        return None
    return run


@functools.cache
def _compiled_packed() -> Callable[..., bool] | None:
    if _compiled() is None:
        return None
    from reparam.kernels.rows_cpu import run_packed

    return run_packed


def _check(y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, spans: Tensor, gain: Tensor | None) -> None:
    """Raise ValueError, listing all shapes and dtypes, unless they match. It runs at every call, so it must be fast."""
    if y.dim() == 3 and A.dim() == B_t.dim() == spans.dim() == 2 and slots.dtype is spans.dtype is torch.int64:
        rows, tokens, outputs = y.shape
        if (
            x.shape == (rows, tokens, A.shape[1])
            and B_t.shape[1] == outputs
            and slots.shape == (rows,)
            and spans.shape[1] == 4
            and (gain is None or (gain.dim() == 2 and gain.shape[1] == outputs))
        ):
            return
    named = {"y": y, "x": x, "slots": slots, "A": A, "B_t": B_t, "spans": spans} | (
        {} if gain is None else {"gain": gain}
    )
    found = ", ".join(f"{name} {list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in named.items())
    raise ValueError(
        "bank_update_: expected y [B, T, O], x [B, T, I], slots [B] int64, A [M, I], B_t [N, O], "
        f"spans [S, 4] int64, gain [G, O] or None; got {found}"
    )


def _check_spans(slots: Tensor, A: Tensor, B_t: Tensor, spans: Tensor, most: int, gain: Tensor | None) -> None:
    """Raise ValueError for slots not in -1 to S - 1, and for spans in use that are outside the tables or above `most`.

    For a CPU only: elsewhere it would wait for the device.
    """
    count = len(spans)
    outside = ((slots < -1) | (slots >= count)).nonzero().flatten().tolist()
    if outside:
        found = ", ".join(f"row {row} has {int(slots[row])}" for row in outside[:8])
        raise ValueError(f"bank_update_: slots must be from -1 to {count - 1}, the bank's last slot, but {found}")
    gains = 0 if gain is None else len(gain)
    used = slots[slots >= 0].unique()
    for slot, (a, b, rank, scale) in zip(used.tolist(), spans[used].tolist(), strict=True):
        inside = 0 <= a <= len(A) - rank and 0 <= b <= len(B_t) - rank
        if not (0 <= rank <= most and inside and -1 <= scale < gains):
            raise ValueError(
                f"bank_update_: slot {slot} has the span {[a, b, rank, scale]} (first row in A, first row in B_t, "
                f"rank, gain), but A has {len(A)} rows, B_t {len(B_t)}, there are {gains} gains, and the largest rank "
                f"is {most}"
            )
