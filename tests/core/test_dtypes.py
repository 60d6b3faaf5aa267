"""The dtypes of computations."""

import torch

from reparam.core.dtypes import compute_dtype, wide


def test_autocast_decides_but_for_float64() -> None:
    x, exact = torch.ones(2), torch.ones(2, dtype=torch.float64)
    assert compute_dtype(x) is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x) is torch.bfloat16
        assert compute_dtype(exact) is torch.float64


def test_wide_is_float32_at_least_and_copies_nothing_that_is() -> None:
    x, exact = torch.ones(2), torch.ones(2, dtype=torch.float64)
    assert wide(x) is x
    assert wide(exact) is exact
    assert wide(x.bfloat16()).dtype is torch.float32
