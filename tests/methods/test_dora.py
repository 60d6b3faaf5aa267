"""DoRA: the paper's identities, the norm without a dense matrix, and gradients."""

from typing import Any

import pytest
import torch
from dora_cases import actual, axes, direction, expected, factors_of, layer, random, stored, update_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import reparam
from reparam.core.base import Site
from reparam.core.registry import STORAGES
from reparam.methods.lora import LoRAUpdate

# ---- the function


@pytest.mark.parametrize(
    ("axis", "m", "n", "result"),
    [
        ("output", [5.0, 5.0], [5.65685, 5.38516], [[3.53553, 3.53553], [1.85695, 4.64238]]),
        ("input", [3.0, 6.40312], [4.47214, 6.40312], [[2.68328, 4.0], [1.34164, 5.0]]),
    ],
)
def test_the_worked_example(axis: str, m: list[float], n: list[float], result: list[list[float]]) -> None:
    """W0 = [[3, 4], [0, 5]], A = [[1, 0]], B = [[1], [2]], s = 1."""
    adapted = layer(torch.tensor([[3.0, 4.0], [0.0, 5.0]]), r=1, alpha=1.0, norm_axis=axis, size=0)
    torch.testing.assert_close(update_of(adapted).magnitude.tolist(), m, rtol=1e-5, atol=0)
    A, B, _ = factors_of(adapted)
    with torch.no_grad():
        A.copy_(torch.tensor([[1.0, 0.0]]))
        B.copy_(torch.tensor([[1.0], [2.0]]))
    torch.testing.assert_close(direction(adapted).norm(dim=1 if axis == "output" else 0).tolist(), n, rtol=1e-5, atol=0)
    torch.testing.assert_close(actual(adapted), torch.tensor(result), rtol=1e-5, atol=0)


@axes
@given(outputs=st.integers(1, 9), inputs=st.integers(1, 9), r=st.integers(1, 4), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds")
def test_the_output_is_the_papers_equation(axis: str, outputs: int, inputs: int, r: int, seed: int) -> None:
    adapted, dim = layer(random(outputs, inputs), r=r, seed=seed, norm_axis=axis), 1 if axis == "output" else 0
    found = actual(adapted).detach()
    torch.testing.assert_close(found, expected(adapted, detached=True, dim=dim), rtol=1e-9, atol=1e-12)
    magnitude, v = update_of(adapted).magnitude, direction(adapted)
    torch.testing.assert_close(found.norm(dim=dim), magnitude.abs())  # ‖W'‖ = |m|
    along = torch.cosine_similarity(found, v, dim=dim)
    torch.testing.assert_close(along, magnitude.sign())  # the direction of W + sBA


@axes
def test_a_fresh_adapter_has_a_gain_of_exactly_one(axis: str) -> None:
    adapted = layer(random(7, 5, dtype=torch.float32), norm_axis=axis, size=0)
    x = random(4, 5, dtype=torch.float32)
    y = adapted(x)
    adapted.active = None
    assert torch.equal(y, adapted(x))


def test_magnitudes_of_the_direction_make_it_lora() -> None:
    adapted = layer(random(7, 5))
    with torch.no_grad():
        update_of(adapted).magnitude.copy_(direction(adapted).norm(dim=1))
    torch.testing.assert_close(actual(adapted), direction(adapted))


def test_the_length_of_the_direction_does_not_matter() -> None:
    """c (W + s B A) with the same m: scale W, and B, by c."""
    w = random(7, 5)
    once, twice = layer(w), layer(3 * w)
    with torch.no_grad():
        factors_of(twice)[1].copy_(3 * factors_of(once)[1])
        factors_of(twice)[0].copy_(factors_of(once)[0])
        update_of(twice).magnitude.copy_(update_of(once).magnitude)
    torch.testing.assert_close(actual(twice), actual(once))


def test_the_bias_is_not_scaled() -> None:
    adapted = layer(random(7, 5))
    x, bias = random(3, 5), random(7, seed=4)
    with_bias = update_of(adapted)(x, adapted.frozen, bias)
    torch.testing.assert_close(with_bias, adapted(x) + bias)


def test_magnitudes_alone() -> None:
    adapted = layer(random(7, 5), magnitude_only=True)
    update = update_of(adapted)
    assert [name for name, _ in update.named_parameters()] == ["magnitude"]
    w = adapted.frozen.tensor()
    torch.testing.assert_close(actual(adapted), (update.magnitude / w.norm(dim=1))[:, None] * w)
    adapted(random(3, 5)).sum().backward()
    assert update.magnitude.grad is not None


@pytest.mark.parametrize("gradient", ["detached", "exact"])
@axes
def test_rows_and_columns_of_zeros_are_plain_lora(gradient: str, axis: str) -> None:
    w = random(6, 5)
    (w if axis == "output" else w.t())[2] = 0
    adapted = layer(w, gradient=gradient, norm_axis=axis)
    torch.testing.assert_close(
        (actual(adapted) if axis == "output" else actual(adapted).t())[2],
        (direction(adapted) if axis == "output" else direction(adapted).t())[2],
    )
    actual(adapted).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in update_of(adapted).parameters())
    assert update_of(adapted).magnitude.grad[2] == 0  # type: ignore[index]
    with torch.no_grad():
        factors_of(adapted)[1].zero_()
    assert actual(adapted).isfinite().all()  # 0 / 0 in the formula


def test_what_is_not_finite_is_refused() -> None:
    w = random(3, 3, dtype=torch.float32)
    w[1, 1] = torch.inf
    with pytest.raises(ValueError, match="DoRA: layer: 1 rows of the base weight have a norm that is not finite"):
        layer(w)


def test_dropout_is_on_the_branch_alone_and_in_training_alone() -> None:
    adapted, x = layer(random(6, 5), dropout=0.5), random(50, 5)
    A, B, s = factors_of(adapted)
    gain = update_of(adapted).magnitude / direction(adapted).norm(dim=1)
    torch.testing.assert_close(adapted(x), x @ expected(adapted, detached=True).t())
    adapted.train()
    torch.manual_seed(0)
    found = adapted(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(found, gain * (x @ adapted.frozen.tensor().t() + s * dropped @ A.t() @ B.t()))
    base = gain * (x @ adapted.frozen.tensor().t())
    with torch.no_grad():
        B.zero_()
        update_of(adapted).magnitude.copy_(gain * adapted.frozen.tensor().norm(dim=1))
    torch.testing.assert_close(adapted(x), base)  # W is applied to the whole input


# ---- the norm


@axes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 0.9999, 1 - 1e-6])
def test_the_norm_is_the_dense_one_also_where_the_update_cancels_the_matrix(
    axis: str, dtype: torch.dtype, share: float
) -> None:
    """s B A = -share W except for the part of W that is not low-rank; affects every row, or column."""
    u, v = random(40, 3), random(3, 30, seed=2)
    w = (u @ v + 1e-3 * random(40, 30, seed=3)).to(dtype)
    adapted = layer(w, r=3, alpha=3.0, norm_axis=axis)
    A, B, _ = factors_of(adapted)
    with torch.no_grad():
        A.copy_(v)
        B.copy_(-share * u)
    dim = 1 if axis == "output" else 0
    dense = direction(adapted).norm(dim=dim)
    found = update_of(adapted)._norms(adapted.frozen).norm
    torch.testing.assert_close(found.double(), dense, rtol=1e-5 if dtype == torch.float32 else 1e-7, atol=0)


@pytest.mark.parametrize("size", [1e-3, 1e-1, 1.0, 30.0])
def test_the_norm_in_16_bits(size: float) -> None:
    adapted = layer(random(64, 48, dtype=torch.bfloat16), r=4, size=size)
    dense = direction(adapted).norm(dim=1)
    torch.testing.assert_close(update_of(adapted)._norms(adapted.frozen).norm.double(), dense, rtol=5e-3, atol=0)


def test_a_total_cancellation_is_no_nan() -> None:
    w = random(4, 1) @ random(1, 3, seed=2)
    adapted = layer(w, r=1, alpha=1.0)
    A, B, _ = factors_of(adapted)
    with torch.no_grad():
        A.copy_(w[:1])
        B.copy_(-(w[:, :1] / w[:1, :1]))
    for parameter in update_of(adapted).parameters():
        assert parameter.isfinite().all()
    assert actual(adapted).isfinite().all()


@stored
@axes
def test_the_norm_on_every_storage_is_that_of_the_quantized_values(axis: str, storage: str) -> None:
    adapted = layer(random(64, 64, dtype=torch.float32))
    weight = STORAGES[storage]().quantize(random(64, 64, dtype=torch.float32))
    dim = 1 if axis == "output" else 0
    method = reparam.DoRA(r=2, norm_axis=axis)
    update = method.build(Site("layer", "linear", 64, 64), weight, None)
    torch.testing.assert_close(update.magnitude.double(), weight.dense().double().norm(dim=dim))
    adapted.hold(weight)
    adapted.updates["a"] = update
    assert isinstance(update.low_rank, LoRAUpdate)
    with torch.no_grad():
        update.low_rank.B.copy_(random(64, 2))
    dense = direction(adapted).norm(dim=dim)
    torch.testing.assert_close(update._norms(weight).norm.double(), dense, rtol=1e-5, atol=0)


def test_a_dense_matrix_is_never_made() -> None:
    """No allocation in a forward and backward is nearly as large as W."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, tuple | list) else [found]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in frozen:
                    self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
            return found

    for gradient in ("detached", "exact"):
        adapted = layer(random(600, 500, dtype=torch.float32), gradient=gradient).train()
        frozen = {adapted.frozen.tensor().untyped_storage().data_ptr()}
        adapted(random(2, 500, dtype=torch.float32))  # ‖W‖² is measured, in blocks
        update_of(adapted).forget()
        with Largest() as largest:
            adapted(random(2, 500, dtype=torch.float32)).sum().backward()
        assert largest.numbers <= 4 * 600


# ---- gradients


@pytest.mark.parametrize("gradient", ["detached", "exact"])
@axes
@given(seed=st.integers(0, 99))
def test_gradients_are_those_of_autograd_on_the_dense_formula(gradient: str, axis: str, seed: int) -> None:
    adapted = layer(random(6, 5), gradient=gradient, norm_axis=axis, seed=seed)
    x = random(4, 5).requires_grad_()
    wanted = [x, *update_of(adapted).parameters()]
    weights = random(4, 6, seed=9)
    found = torch.autograd.grad((adapted(x) * weights).sum(), wanted)
    dense = expected(adapted, detached=gradient == "detached", dim=1 if axis == "output" else 0)
    torch.testing.assert_close(found, torch.autograd.grad((x @ dense.t() * weights).sum(), wanted))


def test_exact_gradients_have_no_part_along_the_direction() -> None:
    """⟨∂L/∂V, v⟩ = 0 for each row, tested through B = V A⁻¹ with a square A."""
    adapted = layer(random(6, 3), r=3, gradient="exact")
    A, B, s = factors_of(adapted)
    found = torch.autograd.grad((adapted(random(4, 3)) * random(4, 6, seed=9)).sum(), B)[0]
    to_v = found @ torch.linalg.inv(A.t()) / s  # ∂L/∂V, because ∂B = s ∂V Aᵀ
    assert ((to_v * direction(adapted)).sum(1).abs() < 1e-10 * to_v.norm(dim=1)).all()


def test_both_modes_give_the_magnitudes_the_same_gradient() -> None:
    found = []
    for gradient in ("detached", "exact"):
        adapted = layer(random(6, 5), gradient=gradient)
        adapted(random(4, 5)).square().sum().backward()
        found.append(update_of(adapted).magnitude.grad)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-6, 0.0])
def test_magnitudes_near_zero_keep_their_gradient(smallest: float) -> None:
    """The gain is divided out of the saved output only if that loses nothing."""
    adapted = layer(random(6, 5, dtype=torch.float32))
    with torch.no_grad():
        update_of(adapted).magnitude[3] = smallest
    x = random(40, 5, dtype=torch.float32)
    adapted(x).sum().backward()
    found = update_of(adapted).magnitude.grad
    dense = torch.autograd.grad((x.double() @ expected(adapted, detached=True).t()).sum(), update_of(adapted).magnitude)
    torch.testing.assert_close(found, dense[0], rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_those_of_differences() -> None:
    adapted = layer(random(4, 3))
    x = random(2, 3).requires_grad_()
    wanted = (x, update_of(adapted).magnitude)
    assert torch.autograd.gradgradcheck(lambda *_: adapted(x), wanted)
