"""The op of mixed batches: every implementation against a naive oracle, and no leaks between rows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reparam.kernels.packs import Step, Tables
from reparam.kernels.rows import backend, bank_update_, packed_update_, update_by_row_, update_by_slot_

IMPLEMENTATIONS = [bank_update_, update_by_slot_, update_by_row_]
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor | None]
compiled = pytest.mark.skipif(backend() == "torch", reason="numba is not installed")


def case(
    rows: int, tokens: int, inputs: int, outputs: int, slots: list[int], ranks: list[int], *,
    gain: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Case:  # fmt: skip
    """Random operands; rows of the tables between the spans, and those of slots that are not in use, are NaN or inf."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    def table(width: int, sizes: list[int], empty: float) -> tuple[Tensor, list[int]]:
        """Rows for each slot, in another order than that of the slots, with gaps; and where each slot's rows begin."""
        parts, first, at = [], [0] * len(sizes), 0
        for s in torch.randperm(len(sizes), generator=g).tolist():
            gap, first[s] = (s + seed) % 3, at + (s + seed) % 3
            own = random(sizes[s], width) if s in slots else torch.full((sizes[s], width), -empty, dtype=dtype)
            parts += [torch.full((gap, width), empty, dtype=dtype), own]
            at = first[s] + sizes[s]
        return torch.cat([*parts, torch.zeros(0, width, dtype=dtype)]), first

    A, down = table(inputs, ranks, float("nan"))
    B_t, up = table(outputs, ranks, float("inf"))
    scaled = [int(gain and (s % 3 < 2)) for s in range(len(ranks))]
    scale, row = table(outputs, scaled, float("nan"))
    spans = [[d, u, rank, r if own else -1] for d, u, rank, r, own in zip(down, up, ranks, row, scaled, strict=True)]
    return (
        random(rows, tokens, outputs),
        random(rows, tokens, inputs),
        torch.tensor(slots, dtype=torch.int64),
        A,
        B_t,
        torch.tensor(spans, dtype=torch.int64).view(-1, 4),
        max((rank for s, rank in enumerate(ranks) if s in slots), default=0) + seed % 2,
        scale if gain else None,
    )


def oracle(
    y: Tensor, x: Tensor, slots: Tensor, A: Tensor, B_t: Tensor, spans: Tensor, most: int, gain: Tensor | None
) -> Tensor:
    """The module's formula, row by row in float64."""
    y, x, A, B_t = y.double(), x.double(), A.double(), B_t.double()
    rows = list(y)
    for row, s in enumerate(slots.tolist()):
        if s >= 0:
            a, b, n, g = spans[s].tolist()
            kept = y[row] if gain is None or g < 0 else gain[g].double() * y[row]
            rows[row] = kept + (x[row] @ A[a : a + n].T) @ B_t[b : b + n]
    return torch.stack(rows) if rows else y.clone()


def applied(implementation: Callable[..., None], operands: Case) -> Tensor:
    """Apply the op to a copy of y."""
    y = operands[0].clone()
    implementation(y, *operands[1:])
    return y


def close(found: Tensor, operands: Case) -> None:
    """Check against the oracle up to the rounding of the dtype, and bit for bit in rows without adapter."""
    # A float32 sum of R products of sums of I products of normal numbers has errors of some ulp of its size.
    size = (operands[1].shape[-1] * operands[6]) ** 0.5 + 1
    tolerance = 8 * torch.finfo(found.dtype).eps * size
    torch.testing.assert_close(found.double(), oracle(*operands), rtol=8 * torch.finfo(found.dtype).eps, atol=tolerance)
    base = operands[2] < 0
    assert torch.equal(bits(found[base]), bits(operands[0][base]))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.numel() else x


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ranks = draw(st.lists(st.integers(0, 11), min_size=1, max_size=5))
    slots = draw(st.lists(st.integers(-1, len(ranks) - 1), max_size=7))
    return case(
        len(slots), draw(st.integers(0, 9) | st.integers(31, 37)), draw(st.integers(1, 70)), draw(st.integers(1, 70)),
        slots, ranks, gain=draw(st.booleans()), seed=draw(st.integers(0, 2**16)),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])),
    )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=80, deadline=None)
@given(operands=cases())
def test_equals_the_naive_formula_and_leaks_nothing(implementation: Callable[..., None], operands: Case) -> None:
    close(applied(implementation, operands), operands)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gain", [False, True])
def test_negative_zero_and_nan_of_a_base_row_keep_their_bits(implementation: Callable[..., None], gain: bool) -> None:
    y, x, *rest = case(2, 5, 8, 8, [-1, 0], [3], gain=gain)
    y[0, 0], y[0, 1], x[0, 2] = -0.0, float("nan"), float("inf")
    found = applied(implementation, (y, x, *rest))
    assert torch.equal(bits(found[0]), bits(y[0]))
    assert found[1].isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_an_adapter_really_holds_is_not_hidden(implementation: Callable[..., None], value: float) -> None:
    operands = case(1, 6, 32, 32, [0], [5])
    operands[3][operands[5][0, 0] + 1, 7] = value
    assert not applied(implementation, operands).isfinite().any()


@compiled
@settings(max_examples=60, deadline=None)
@given(operands=cases(), data=st.data())
def test_a_row_does_not_depend_on_the_others(operands: Case, data: st.DataObject) -> None:
    y, x, slots, *bank = operands
    if not len(slots) or y.dtype is not torch.float32:
        return
    together = applied(bank_update_, operands)
    kept = torch.tensor(data.draw(st.lists(st.integers(0, len(slots) - 1), min_size=1, max_size=9)))
    alone = applied(bank_update_, (y[kept], x[kept], slots[kept], *bank))
    assert torch.equal(bits(alone), bits(together[kept]))


@compiled
def test_threads_do_not_change_a_bit() -> None:
    operands = large()
    before = torch.get_num_threads()
    try:
        found = {}
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found[threads] = applied(bank_update_, operands)
    finally:
        torch.set_num_threads(before)
    close(found[1], operands)
    assert all(torch.equal(bits(found[1]), bits(y)) for y in found.values())


@compiled
def test_calls_from_several_threads_at_once() -> None:
    operands = large()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = applied(bank_update_, operands)
        with ThreadPoolExecutor(4) as callers:
            found = list(callers.map(lambda _: applied(bank_update_, operands), range(24)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(bits(y), bits(expected)) for y in found)


def large() -> Case:
    """Operands for several threads, in rows that do not divide evenly; one row uses the base."""
    return case(5, 97, 384, 520, [2, 0, -1, 1, 2], [16, 3, 21], gain=True)


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_makes_its_own_threads() -> None:
    operands = large()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = applied(bank_update_, operands)  # the parent's threads exist now
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)  # a hang is a failure too
            code = 1
            try:
                bank_update_(*operands)
                # Compared by numpy: torch's own OpenMP threads would hang in a forked child.
                code = 0 if np.array_equal(operands[0].numpy(), expected.numpy()) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("spoil", ["y", "x", "factors", "slots", "gain"])
def test_strided_operands(spoil: str) -> None:
    y, x, slots, A, B_t, spans, most, gain = case(3, 5, 16, 24, [1, -1, 0], [4, 2], gain=True)
    assert gain is not None
    spread = {"y": [y], "x": [x], "factors": [A, B_t], "slots": [slots], "gain": [gain]}[spoil]

    def strided(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT if t.dim() > 1 else torch.stack([t, t], 1)[:, 0]

    operands: Any = tuple(
        strided(t) if any(t is s for s in spread) else t for t in (y, x, slots, A, B_t, spans, most, gain)
    )
    expected = oracle(*operands)
    bank_update_(*operands)
    torch.testing.assert_close(operands[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_factors_on_a_bfloat16_model_round_once(implementation: Callable[..., None]) -> None:
    y, x, slots, *bank = case(4, 3, 64, 48, [1, 0, -1, 1], [8, 4], gain=True)
    operands: Any = (y.bfloat16(), x.bfloat16(), slots, *bank)
    found = applied(implementation, operands)
    assert found.dtype is torch.bfloat16
    exact = oracle(*operands)
    nearest = exact.bfloat16().double()
    assert ((found.double() - exact).abs() <= (nearest - exact).abs() + 1e-4).all()


def test_an_empty_bank_leaves_everything() -> None:
    for implementation in IMPLEMENTATIONS:
        operands = case(2, 3, 8, 8, [-1, -1], [])
        assert torch.equal(applied(implementation, operands), operands[0])


@pytest.mark.parametrize("implementation", [bank_update_, update_by_slot_])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slot", [2, 99, -2])
def test_a_slot_outside_the_bank_is_refused_before_anything_is_written(
    implementation: Callable[..., None], dtype: torch.dtype, slot: int
) -> None:
    operands = case(3, 2, 8, 8, [0, 1, slot], [2, 2], dtype=dtype)
    before = operands[0].clone()
    with pytest.raises(ValueError, match=rf"from -1 to 1.*row 2 has {slot}"):
        implementation(*operands)
    assert torch.equal(operands[0], before)


@pytest.mark.parametrize("implementation", [bank_update_, update_by_slot_])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("column", "value"), [(0, 9), (0, -1), (1, 9), (1, -1), (2, 5), (2, -1), (3, 7), (3, -2)])
def test_a_span_outside_the_tables_is_refused_before_anything_is_written(
    implementation: Callable[..., None], dtype: torch.dtype, column: int, value: int
) -> None:
    operands = case(2, 2, 8, 8, [0, 1], [2, 4], gain=True, dtype=dtype)
    operands[5][1, column] = value
    before = operands[0].clone()
    with pytest.raises(ValueError, match=r"slot 1 has the span .*, but A has 7 rows"):
        implementation(*operands)
    assert torch.equal(operands[0], before)


def test_a_span_outside_the_tables_does_not_matter_while_no_row_uses_it() -> None:
    operands = case(2, 2, 8, 8, [0, 0], [2, 4])
    operands[5][1] = -7
    for implementation in IMPLEMENTATIONS:
        close(applied(implementation, operands), operands)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 5, 7])
def test_shapes_that_do_not_fit_are_named(index: int) -> None:
    operands: list[Any] = list(case(3, 2, 8, 6, [0, 1, 1], [2, 2], gain=True))
    operands[index] = operands[index][:, 1:] if index in (3, 4, 5, 7) else operands[index][1:]
    name = ("y", "x", "slots", "A", "B_t", "spans", "", "gain")[index]
    with pytest.raises(ValueError, match=rf"got .*\b{name} \[{operands[index].shape[0]}"):
        bank_update_(*operands)


def test_integer_dtypes_are_checked() -> None:
    y, x, slots, *bank = case(1, 2, 8, 6, [0], [2])
    with pytest.raises(ValueError, match="slots \\[1\\] int32"):
        bank_update_(y, x, slots.int(), *bank)


@pytest.mark.parametrize("compiling", [False, True])
def test_gradients_are_those_of_the_formula(compiling: bool) -> None:
    y, x, slots, A, B_t, spans, most, gain = case(4, 3, 5, 6, [1, -1, 0, 1], [2, 3], gain=True, dtype=torch.float64)
    assert gain is not None
    leaves = [t.clone().requires_grad_() for t in (y, x, A, B_t, gain)]
    twins = [t.clone().requires_grad_() for t in (y, x, A, B_t, gain)]

    def adapted(y: Tensor, x: Tensor, A: Tensor, B_t: Tensor, gain: Tensor) -> Tensor:
        out = y * 1
        bank_update_(out, x, slots, A, B_t, spans, most, gain)
        return out.sin()

    run = torch.compile(adapted, fullgraph=True, backend="aot_eager") if compiling else adapted
    grads = torch.autograd.grad(run(*leaves).sum(), leaves)
    expected = torch.autograd.grad(
        oracle(twins[0] * 1, twins[1], slots, twins[2], twins[3], spans, most, twins[4]).sin().sum(), twins
    )
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert grads[1].isfinite().all()


def test_writing_over_what_a_backward_needs_is_noticed() -> None:
    _, x, slots, *bank = case(2, 3, 8, 8, [0, -1], [2])
    leaf = torch.zeros(2, 3, 8, requires_grad=True)
    y = leaf.tanh()  # its backward needs its result
    with torch.no_grad():
        bank_update_(y, x, slots, *bank)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("gain", [False, True])
def test_opcheck(gain: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        operands = case(3, 4, 8, 6, [1, -1, 0], [2, 4], gain=gain, dtype=dtype)
        for table in operands[3:5]:
            table.nan_to_num_(0, 0, 0)  # opcheck compares operands, and NaN is not equal to itself
        torch.library.opcheck(torch.ops.reparam.bank_update_.default, operands)


@pytest.mark.parametrize("tokens", [1, 7])
def test_compiles_into_one_graph(tokens: int) -> None:
    _, x, slots, A, B_t, spans, most, gain = case(3, tokens, 16, 24, [1, -1, 0], [4, 2], gain=True)
    W = torch.randn(24, 16)

    def layer(x: Tensor, slots: Tensor) -> Tensor:
        out = torch.nn.functional.linear(x, W)
        bank_update_(out, x, slots, A, B_t, spans, most, gain)
        return out + 1

    with torch.no_grad():
        graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for rows in (slots, slots.flip(0)):
            assert torch.equal(graph(x, rows), layer(x, rows))


def python(code: str) -> str:
    """The output of a fresh Python process."""
    # Machine code without optimization, where it is compiled at all, is soon made.
    env = {**os.environ, "NUMBA_OPT": "0"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout


def test_numba_is_imported_at_first_use_and_without_it_the_reference_runs() -> None:
    code = """
import sys
import torch
from reparam.kernels.rows import backend, bank_update_
print("numba" in sys.modules)
sys.modules["numba"] = None  # what an import finds where the package is missing
y = torch.zeros(1, 1, 2)
span = torch.tensor([[0, 0, 1, -1]])
bank_update_(y, torch.ones(1, 1, 3), torch.tensor([0]), torch.ones(1, 3), torch.ones(1, 2), span, 1)
print(backend(), y.flatten().tolist())
"""
    assert python(code).splitlines() == ["False", "torch [3.0, 3.0]"]


def odd(number: int) -> bool:
    return number % 2 == 1


@compiled
def test_a_kernel_compiles_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a read-only installation and home folder."""
    from numba.core.caching import CacheImpl

    from reparam.kernels.threads import compile_kernel

    assert CacheImpl._locator_classes
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    kernel = compile_kernel(odd, fastmath=set())
    assert [kernel(number) for number in range(4)] == [False, True, False, True]


@compiled
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_of_any_lengths_equal_each_row_alone_bit_for_bit(threads: int) -> None:
    lengths, slots = [1, 170, 0, 1, 5, 1, 133, 1], [2, 0, 1, -1, 3, 0, 2, 3]
    y, x, _, *held = case(1, sum(lengths), 257, 400, [0, 1, 2, 3], [8, 1, 5, 16], gain=True)
    tables, most = tables_of(held), held[3]
    begins = torch.tensor([0, *np.cumsum(lengths)])
    expected = y.clone()
    for slot, start, end in zip(slots, begins.tolist(), begins[1:].tolist(), strict=False):
        bank_update_(expected[:, start:end], x[:, start:end], torch.tensor([slot]), *held)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            found = y[0].clone()
            assert packed_update_(found, x[0], Step(begins, torch.tensor(slots)), tables, most)
            with pytest.raises(ValueError, match="slots must be from -1 to 3"):
                packed_update_(found, x[0], Step(begins, torch.tensor([4] * 8)), tables, most)
            with pytest.raises(ValueError, match=r"has 312 tokens, .* x is \[311, 257\]"):
                packed_update_(found, x[0, 1:], Step(begins, torch.tensor(slots)), tables, most)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected[0])
    assert not torch.equal(found, y[0])


def test_what_the_packed_kernel_cannot_compute_is_left_unchanged() -> None:
    y, x, slots, *held = case(1, 4, 8, 8, [0], [2], gain=True, dtype=torch.bfloat16)
    before, step = y.clone(), Step(torch.tensor([0, 4]), slots)
    with torch.no_grad():
        assert not packed_update_(y[0], x[0], step, tables_of(held), held[3])
    y, x, slots, *held = case(1, 4, 8, 8, [0], [2], gain=True)
    assert not packed_update_(y[0], x[0].requires_grad_(), Step(step.begins, slots), tables_of(held), held[3])
    assert torch.equal(before, case(1, 4, 8, 8, [0], [2], gain=True, dtype=torch.bfloat16)[0])


def tables_of(held: list[Any]) -> Tables:
    A, B_t, spans, _, gain = held
    return Tables(A, B_t, spans, gain)
