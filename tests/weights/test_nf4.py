"""The storage NF4: its size, ways to read a weight, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nf4_cases import DTYPES, blocks, normal, seeds, shapes
from torch import Tensor

from reparam.kernels.nf4 import compress_scales, dequantize, quantize
from reparam.kernels.nf4_tables import NESTED_BLOCK, Statistics
from reparam.weights.nf4 import NF4, NF4Weight

# ---- the storage


def bits(weight: NF4Weight) -> int:
    return 8 * sum(parameter.nbytes for parameter in weight.parameters())


@pytest.mark.parametrize("shape", [(128, 128), (64, 512), (256, 320), (1, 16384)], ids=str)
def test_bits_an_entry(shape: tuple[int, int]) -> None:
    """Exact if blocks of blocks are full: 4.5, and 4.127 plus one float32 for the whole matrix."""
    w = normal(*shape)
    assert bits(NF4(double=False).quantize(w)) == 4.5 * w.numel()
    assert bits(NF4().quantize(w)) == 4.126953125 * w.numel() + 32


@given(shape=shapes, block=blocks, double=st.booleans())
def test_bytes_of_any_matrix(shape: tuple[int, int], block: int, double: bool) -> None:
    n = shape[0] * shape[1]
    N = -(-n // block)
    weight = NF4(block, double).quantize(normal(*shape))
    extra = N + 4 * -(-N // NESTED_BLOCK) + 4 if double else 4 * N
    assert bits(weight) == 8 * (-(-n // 2) + extra)


@given(shape=shapes, block=blocks, double=st.booleans(), seed=seeds, dtype=st.sampled_from(DTYPES))
def test_every_way_to_ask_a_weight_gives_the_same_numbers(
    shape: tuple[int, int], block: int, double: bool, seed: int, dtype: torch.dtype
) -> None:
    """Whole, by rows, by lookup, by entry, and as an operator."""
    w = normal(*shape, seed=seed, dtype=dtype)
    weight = NF4(block, double).quantize(w)
    codes, absmax = quantize(w, block)
    stats = compress_scales(absmax) if double else Statistics(absmax)
    whole = dequantize(codes, stats, block=block, count=w.numel(), dtype=torch.float32).view(shape)
    assert (weight.out_features, weight.in_features) == weight.shape == shape
    assert torch.equal(weight.dense(), whole)
    for rows in (slice(1, None), slice(0, 0), slice(shape[0] // 2, shape[0] // 2 + 3), slice(-1, None), slice(3, 1)):
        assert torch.equal(weight.dense(rows), whole[rows])
    ids = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 0]])
    assert torch.equal(weight.rows(ids), whole[ids].to(dtype))
    assert torch.equal(weight.at(torch.arange(w.numel())), whole.view(-1))
    assert torch.equal(weight.tensor(), whole.to(dtype))
    assert weight.dtype == dtype
    unit = torch.eye(shape[1], dtype=torch.float64)
    assert torch.equal(weight(unit), whole.double().t())


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_an_id_that_is_no_row_is_refused(bad: int) -> None:
    """Negative ids and ids in the padding would give something else than an embedding's rows."""
    for shape in ((9, 7), (9, 1)):
        weight = NF4().quantize(normal(*shape))
        with pytest.raises(RuntimeError, match="an id is not one of the 9 rows"):
            weight.rows(torch.tensor([0, bad]))
        ids = torch.tensor([8, 0], dtype=torch.int32)
        assert torch.equal(weight.rows(ids), weight.dense()[ids])


def test_a_parameter_is_quantized_and_nothing_of_it_trains() -> None:
    w = torch.nn.Parameter(normal(8, 8))
    weight = NF4().quantize(w)
    assert not any(p.requires_grad for p in weight.parameters())
    assert weight.storage == NF4()
    assert NF4(32, double=False).quantize(w).storage == NF4(32, double=False)


def test_a_matrix_without_values_has_the_same_tensors() -> None:
    """On the meta device, so that the size of a model is known before it is loaded."""
    for storage in (NF4(), NF4(32, double=False)):
        real, empty = (storage.quantize(normal(24, 50).to(device)) for device in ("cpu", "meta"))
        assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in real.state_dict().items()
        }


# ---- what is refused


@pytest.mark.parametrize("block", [0, -64, 1, 48, 63, 8192, True, 64.0, "64", None])
def test_a_block_size_that_the_format_does_not_have_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match=r"(?i)nf4: block=.*expected (one of 32, 64, .*4096|a whole number)"):
        NF4(block)


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "a vector": (lambda: torch.ones(64), r"expected a non-empty matrix .* got float32 \[64\]$"),
    "three dimensions": (lambda: torch.ones(2, 4, 4), r"expected a non-empty matrix .* got float32 \[2, 4, 4\]$"),
    "no rows": (lambda: torch.ones(0, 64), r"expected a non-empty matrix .* got float32 \[0, 64\]$"),
    "no columns": (lambda: torch.ones(64, 0), r"expected a non-empty matrix .* got float32 \[64, 0\]$"),
    "integers": (lambda: torch.ones(4, 4, dtype=torch.int64), r"got int64 \[4, 4\]; is it quantized already\?"),
    "quantized": (
        lambda: NF4().quantize(normal(4, 8)).codes[:, None],
        r"got uint8 \[16, 1\]; is it quantized already\?",
    ),
    "eight bits": (lambda: torch.ones(4, 4).to(torch.float8_e4m3fn), r"got float8_e4m3fn \[4, 4\]"),
    "NaN": (lambda: spoilt(float("nan"), torch.float32), r"NaN.*first at \[2, 5\]"),
    "infinity": (lambda: spoilt(float("-inf"), torch.bfloat16), r"NaN.*first at \[2, 5\]"),
    "beyond float32": (lambda: spoilt(1e300, torch.float64), r"first at \[2, 5\]"),
    "sums beyond float32": (lambda: spoilt(3e38, torch.float32), r"first at \[2, 5\]"),
}


def spoilt(value: float, dtype: torch.dtype) -> Tensor:
    w = normal(4, 9, dtype=dtype)
    w[2, 5] = value
    w[3, 1] = value
    return w


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_quantized_is_refused_in_a_sentence(what: str) -> None:
    make, message = REFUSED[what]
    w = make()
    with pytest.raises(ValueError, match=f"^nf4: .*{message}") as caught:
        NF4().quantize(w)
    assert len(str(caught.value)) < 200


def test_large_numbers_below_the_limit_are_quantized() -> None:
    w = normal(64, 64) * 1e29
    error = (NF4().quantize(w).dense() - w).abs()
    assert bool((error <= 0.2 * w.abs().max()).all())
