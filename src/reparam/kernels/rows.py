"""The op of mixed batches: apply each batch row's own low-rank factors, in place on the output of the base map.

For a row b with slot s = slots[b] >= 0 and rank n = ranks[s]:

    y[b] = gain[s] ∘ y[b] + (x[b] A[s, :n]ᵀ) B_t[s, :n]

This applies the normal form `W' = diag(gain) · W + B · A` to rows whose `y[b] = W x[b]` (without bias) is given. Rows
with slot -1 do not change. Slots that no row uses, and ranks beyond n, never affect a result, even if they contain NaN.

There are three implementations. `update_by_row_` and `update_by_slot_` use torch; they support any device and dtype and
are differentiable. The compiled kernel of `rows_cpu` is for contiguous float32 on a CPU; with it, the result of a row
is bitwise independent of the other rows. `backend()` tells whether the compiled kernel is available.

Shapes: B rows of the batch, T tokens in a row, I in_features, O out_features, S slots, R largest rank in the bank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_NAME = "reparam::bank_update_"
torch.library.define(
    _NAME,
    "(Tensor(a!) y, Tensor x, Tensor slots, Tensor A, Tensor B_t, Tensor ranks, Tensor? gain=None) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


def bank_update_(
    y: Tensor,  # [B, T, O]
    x: Tensor,  # [B, T, I]
    slots: Tensor,  # [B] int64, -1 for no adapter
    A: Tensor,  # [S, R, I]
    B_t: Tensor,  # [S, R, O], B transposed, including the scale
    ranks: Tensor,  # [S] int64
    gain: Tensor | None = None,  # [S, O], 1 for slots without a gain
) -> None:
    """Scale each row of `y` by its gain and add its low-rank product, in place. `y` shares no memory with the rest.

    `torch.compile` sees one op. If an argument requires gradients, a torch reference runs instead, which is
    differentiable in all arguments; the op itself is for inference.

    Raises ValueError if shapes do not match, if `slots` or `ranks` is not int64 or, on a CPU, if a slot or rank is
    outside the bank; `y` is then unchanged. On other devices, a slot outside the bank is an indexing error.

    >>> A, B_t = torch.ones(1, 2, 3), torch.ones(1, 2, 4)  # one slot of rank 2
    >>> y = torch.zeros(2, 1, 4)
    >>> bank_update_(y, torch.ones(2, 1, 3), torch.tensor([0, -1]), A, B_t, torch.tensor([2]))
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
        _check(y, x, slots, A, B_t, ranks, gain)
        # Grouping by slot has data-dependent shapes, which a traced graph does not support.
        grouped = y.device.type == "cpu" and not torch.compiler.is_compiling()
        (update_by_slot_ if grouped else update_by_row_)(y, x, slots, A, B_t, ranks, gain)
    else:
        torch.ops.reparam.bank_update_.default(y, x, slots, A, B_t, ranks, gain)


def backend() -> str:
    """The backend for float32 on a CPU: "numba", or "torch" if numba cannot be imported. Loads the kernel."""
    return "torch" if _compiled() is None else "numba"


def update_by_row_(
    y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, ranks: Tensor, gain: Tensor | None = None
) -> None:
    """The reference for accelerators and traced graphs: gather the factors of each row, then two batched products.

    Its shapes are static and it does not synchronize. On a CPU, copying factors for each row costs more than the
    products.
    """
    if not len(A):  # an empty bank: every row uses the base model
        return
    active = slots >= 0
    slot = slots.clamp(min=0)
    own = torch.where(active, ranks[slot], 0)
    down, up = _without_padding(A[slot], own), _without_padding(B_t[slot], own)
    delta = torch.bmm(torch.bmm(x.to(A.dtype), down.mT), up)
    kept = y
    if gain is not None:
        # The gradient of the gain needs the old y, which is overwritten below.
        before = y.clone() if gain.requires_grad and torch.is_grad_enabled() else y
        kept = before * torch.where(active[:, None], gain[slot], 1).unsqueeze(1)
    y.copy_(torch.where(active[:, None, None], kept + delta, y))


def update_by_slot_(
    y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, ranks: Tensor, gain: Tensor | None = None
) -> None:
    """The reference for a CPU: sort rows by slot into chunks of equal length, and copy the factors once per chunk.

    A chunk has the average number of rows per used slot. There are thus at most two chunks per used slot on average,
    and copies and padding are at most about twice the minimum, however unevenly the rows use the slots.
    """
    _check_slots(slots, len(A))
    rows = (slots >= 0).nonzero().squeeze(1)
    if not len(rows):
        return
    rows = rows[slots[rows].argsort(stable=True)]
    used, counts = slots[rows].unique_consecutive(return_counts=True)
    size = -(-len(rows) // len(used))  # rows in a chunk
    chunks = (counts + size - 1) // size
    first = (chunks.cumsum(0) - chunks) * size - (counts.cumsum(0) - counts)
    # Where each row is in the padded chunks:
    lane = first.repeat_interleave(counts) + torch.arange(len(rows), device=rows.device)
    slot = used.repeat_interleave(chunks)
    down, up, own = A.index_select(0, slot), B_t.index_select(0, slot), ranks[slot]
    if bool((own < A.shape[1]).any()):
        down, up = _without_padding(down, own), _without_padding(up, own)
    tokens, lanes = x.shape[1], len(slot) * size
    padded = x.new_zeros(lanes, *x.shape[1:], dtype=A.dtype)
    padded.index_copy_(0, lane, x.index_select(0, rows).to(A.dtype))
    delta = torch.bmm(torch.bmm(padded.view(len(slot), size * tokens, x.shape[2]), down.mT), up)
    kept = y.index_select(0, rows)
    if gain is not None:
        kept = kept * gain.index_select(0, slots[rows]).unsqueeze(1)
    new = kept + delta.view(lanes, *y.shape[1:]).index_select(0, lane)
    y.index_copy_(0, rows, new.to(y.dtype))


def _without_padding(factors: Tensor, ranks: Tensor) -> Tensor:
    """The factors [K, R, N] with zeros beyond their ranks [K], because NaN there must not affect the result."""
    beyond = torch.arange(factors.shape[1], device=factors.device) >= ranks[:, None]  # [K, R]
    return factors.masked_fill(beyond.unsqueeze(2), 0)


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _any_device(
    y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, ranks: Tensor, gain: Tensor | None = None
) -> None:
    _check(y, x, slots, A, B_t, ranks, gain)
    update_by_row_(y, x, slots, A, B_t, ranks, gain)


@torch.library.impl(_NAME, "CPU")
def _cpu(
    y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, ranks: Tensor, gain: Tensor | None = None
) -> None:
    _check(y, x, slots, A, B_t, ranks, gain)
    single = torch.float32
    plain = y.dtype is x.dtype is A.dtype is B_t.dtype is single and (gain is None or gain.dtype is single)
    kernel = _compiled() if plain and y.is_contiguous() else None
    if kernel is None:
        update_by_slot_(y, x, slots, A, B_t, ranks, gain)
        return
    gain = gain if gain is None else gain.contiguous()
    if not kernel(y, x.contiguous(), slots.contiguous(), A.contiguous(), B_t.contiguous(), ranks.contiguous(), gain):
        _check_slots(slots, len(A))
        raise ValueError(
            f"bank_update_: ranks {ranks.tolist()} must be from 0 to {A.shape[1]}, the bank's largest rank"
        )
    torch.autograd.graph.increment_version(y)  # autograd does not see the kernel's write


@torch.library.register_fake(_NAME)
def _fake(
    y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, ranks: Tensor, gain: Tensor | None = None
) -> None:
    _check(y, x, slots, A, B_t, ranks, gain)


@functools.cache
def _compiled() -> Callable[..., bool] | None:
    """The compiled kernel, or None if numba cannot be imported. Imported at first use, because that is slow."""
    try:
        from reparam.kernels.rows_cpu import run
    except (ImportError, OSError):  # OSError: llvmlite is installed, but its shared library is missing
        return None
    return run


def _check(y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, ranks: Tensor, gain: Tensor | None) -> None:
    """Raise ValueError, listing all shapes and dtypes, unless they match. It runs at every call, so it must be fast."""
    if y.dim() == 3 and A.dim() == 3 and slots.dtype is ranks.dtype is torch.int64:
        rows, tokens, outputs = y.shape
        count, rank, inputs = A.shape
        if (
            x.shape == (rows, tokens, inputs)
            and B_t.shape == (count, rank, outputs)
            and slots.shape == (rows,)
            and ranks.shape == (count,)
            and (gain is None or gain.shape == (count, outputs))
        ):
            return
    named = {"y": y, "x": x, "slots": slots, "A": A, "B_t": B_t, "ranks": ranks} | (
        {} if gain is None else {"gain": gain}
    )
    found = ", ".join(f"{name} {list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in named.items())
    raise ValueError(
        "bank_update_: expected y [B, T, O], x [B, T, I], slots [B] int64, A [S, R, I], B_t [S, R, O], "
        f"ranks [S] int64, gain [S, O] or None; got {found}"
    )


def _check_slots(slots: Tensor, count: int) -> None:
    """Raise ValueError for slots not in -1 to count - 1. For a CPU only: elsewhere it would wait for the device."""
    outside = ((slots < -1) | (slots >= count)).nonzero().flatten().tolist()
    if outside:
        found = ", ".join(f"row {row} has {int(slots[row])}" for row in outside[:8])
        raise ValueError(f"bank_update_: slots must be from -1 to {count - 1}, the bank's last slot, but {found}")
