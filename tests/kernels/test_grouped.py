"""The product of groups as an op: its gradients, its registration, and its Triton kernels in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reparam.kernels.grouped_op import grouped

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def drawn(dtype: torch.dtype, ranks: tuple[int, ...] = (3, 3, 3)) -> tuple[Any, ...]:
    """70 rows of 5 groups, of which one has no rows, one has no factors, and the last two rows are in no group."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    x, weight = random(70, 40), random(5, 40, 72).transpose(1, 2)
    A, B = [random(r, 40) for r in ranks], [random(72, r) for r in ranks]
    return x, torch.tensor([3, 3, 40, 41, 68]), weight, A, B, [2.0, 0.5, 1.0], [0, 1, 2]


def exact(x: Tensor, ends: Tensor, W: Tensor, A: Any, B: Any, scales: Any, groups: Any) -> Tensor:
    """The same, in plain torch, from the matrix of each row."""
    row = torch.searchsorted(ends, torch.arange(len(x)), right=True)
    changed = [w.clone() for w in W]
    for a, b, scale, group in zip(A, B, scales, groups, strict=True):
        changed[group] = changed[group] + scale * (b @ a)
    all_of = torch.stack([*changed, torch.zeros_like(W[0])])[row]
    return torch.einsum("soi,si->so", all_of, x)


def test_outputs_and_gradients_are_those_of_plain_torch() -> None:
    x, ends, W, A, B, *rest = drawn(torch.float64, (2, 4, 1))
    leaves = [t.requires_grad_() for t in (x, *A, *B)]
    found, expected = (f(x, ends, W, A, B, *rest) for f in (grouped, exact))
    assert torch.allclose(found, expected, atol=1e-11)
    g = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one, other in zip(torch.autograd.grad(found, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def test_the_op_is_registered_as_torch_expects() -> None:
    x, ends, W, A, B, *rest = drawn(torch.float32, (2, 4, 1))
    for tensor in (x, *A, *B):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.reparam.grouped.default, (x, ends, W, A, B, *rest))


@pytest.mark.skipif(not INTERPRETED, reason="in Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_give_the_numbers_of_the_reference(dtype: torch.dtype) -> None:
    from reparam.kernels import grouped_gpu

    args = drawn(dtype)
    y, low = grouped_gpu.grouped(*args)
    bound = {"atol": 1e-4 if dtype is torch.float32 else 0.2, "rtol": 1e-2}
    wide = (args[0].double(), args[1], args[2].double(), *([t.double() for t in own] for own in args[3:5]), *args[5:])
    expected, h = torch.ops.reparam.grouped.default(*wide)
    assert torch.allclose(y.double(), expected, **bound)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = grouped_gpu.grouped_grad(g, args[0], low, *args[1:])
    judge = torch.ops.reparam.grouped_grad.default(g.double(), wide[0], h, *wide[1:])
    for one, other in zip((found[0], *found[1], *found[2]), (judge[0], *judge[1], *judge[2]), strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one.double(), other, **bound)


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [__file__, "-k", "numbers_of"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "2 passed" in run.stdout
