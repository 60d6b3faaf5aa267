"""A note on CPUs that are slow in the dtype of the base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reparam.train import speed


@pytest.mark.parametrize(("dtype", "key"), [(torch.bfloat16, "base.dtype"), (torch.float16, "base.dtype")])
def test_a_slow_dtype_is_told(dtype: torch.dtype, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_seconds", lambda of: 1.0 if of is torch.float32 else 8.0)
    told = speed.slow_dtype(nn.Linear(2, 2, dtype=dtype), "float32")
    assert told is not None
    assert "about 8 times as slowly" in told
    assert f"--{key} float32" in told


def test_autocast_names_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_seconds", lambda of: 1.0 if of is torch.float32 else 8.0)
    assert "--run.precision float32" in str(speed.slow_dtype(nn.Linear(2, 2), "bfloat16"))


def test_nothing_is_told_of_a_fast_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_seconds", lambda of: 1.0)
    assert speed.slow_dtype(nn.Linear(2, 2, dtype=torch.bfloat16), "float32") is None
    monkeypatch.setattr(speed, "_seconds", lambda of: 1.0 if of is torch.float32 else 8.0)
    assert speed.slow_dtype(nn.Linear(2, 2), "float32") is None
