"""The core classes: factors, storages, registries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_numbers import numbers
from torch import nn

import reparam
from reparam.core.base import Factors, Site, Storage, Update, Weight
from reparam.core.checks import nearest
from reparam.core.method import Method
from reparam.core.registry import METHODS, STORAGES, find_method, find_storage
from reparam.weights.dense import DenseWeight

sizes = st.integers(1, 8)


# ---- factors


@given(o=sizes, i=sizes, r=sizes, gained=st.booleans(), seed=st.integers(0, 99))
def test_factors_are_the_normal_form(o: int, i: int, r: int, gained: bool, seed: int) -> None:
    A, B, W = numbers(r, i, seed=seed), numbers(o, r, seed=seed + 1), numbers(o, i, seed=seed + 2)
    gain = numbers(o, seed=seed + 3) if gained else None
    expected = (W if gain is None else torch.diag(gain) @ W) + B @ A
    torch.testing.assert_close(Factors(A, B, gain).apply(W), expected)
    norm = float(torch.linalg.matrix_norm(B @ A))
    assert Factors(A, B, gain).low_rank_norm() == pytest.approx(norm, rel=1e-6, abs=1e-9)


def test_the_norm_of_a_product_that_cancels_is_no_nan() -> None:
    A = torch.cat([numbers(1, 6), -numbers(1, 6)]).float()
    assert Factors(A, torch.ones(4, 2)).low_rank_norm() == pytest.approx(0, abs=1e-6)


def test_factors_are_differentiable_and_take_the_dtype_of_the_matrix() -> None:
    parts = [t.requires_grad_() for t in (numbers(2, 3), numbers(4, 2), numbers(4))]
    assert torch.autograd.gradcheck(lambda A, B, g: Factors(A, B, g).apply(numbers(4, 3, seed=9)), tuple(parts))
    assert Factors(*(t.detach().float() for t in parts)).apply(numbers(4, 3).bfloat16()).dtype == torch.bfloat16


# ---- storages


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_storage_is_an_operator_that_agrees_with_its_matrix(name: str, dtype: torch.dtype) -> None:
    weight = STORAGES[name]().quantize(numbers(24, 64).to(dtype))
    W = weight.dense()
    assert (weight.out_features, weight.in_features) == W.shape == (24, 64)
    assert W.dtype == torch.float32
    assert not any(p.requires_grad for p in weight.parameters())
    assert weight.storage.name == name
    assert type(weight.storage)(**weight.storage.settings()) == weight.storage
    x, bias = numbers(5, 64, seed=1).to(weight.dtype), numbers(24, seed=2).to(weight.dtype)
    loose = {"rtol": 3e-2, "atol": 3e-2} if weight.dtype.itemsize < 4 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(weight(x, bias).float(), x.float() @ W.T + bias.float(), **loose)
    torch.testing.assert_close(weight(x).float(), x.float() @ W.T, **loose)
    ids = torch.tensor([[3, 3], [0, 23]])
    torch.testing.assert_close(weight.rows(ids).float(), W[ids], **loose)
    assert torch.equal(weight.dense(slice(3, 7)), W[3:7])
    assert weight.tensor().dtype == weight.dtype
    torch.testing.assert_close(weight.tensor().float(), W, **loose)
    again = weight.storage.quantize(2 * W)
    assert type(again) is type(weight)
    torch.testing.assert_close(again.dense(), 2 * W, rtol=0.1, atol=0.1)
    x = x.requires_grad_()
    (found,) = torch.autograd.grad(weight(x).float().sum(), x)
    torch.testing.assert_close(found.float(), W.sum(0).expand(5, 64), rtol=3e-2, atol=3e-1)


def test_the_dense_storage_takes_a_parameter_over() -> None:
    parameter = nn.Parameter(torch.randn(3, 4))
    weight = DenseWeight(parameter)
    assert weight.matrix is parameter
    assert not parameter.requires_grad
    assert weight.dense().data_ptr() == weight.tensor().data_ptr() == parameter.data_ptr()
    assert weight.dense_or_none is parameter


# ---- registries


def test_a_name_that_nobody_registered_is_an_error_that_names_the_nearest() -> None:
    assert find_method("lora") is reparam.LoRA is METHODS["lora"]
    with pytest.raises(ValueError, match=r"unknown method 'lroa' \(did you mean 'lora'.*\?\): the methods are .*lora"):
        find_method("lroa")
    assert nearest("zzz", METHODS) == ""
    assert find_storage("nf4") is reparam.NF4
    with pytest.raises(ValueError, match=r"unknown storage 'fn4' \(did you mean 'nf4'\?\): the storages are .*int8"):
        find_storage("fn4")


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_method_is_its_settings(method: type[Method]) -> None:
    # xlora needs hidden states, which the conformance suite's layers do not have; PEFT builds the other two
    assert method.examples or method.name in ("xlora", "prefix", "prompt")
    for settings in method.examples or ({},):
        made = method(**settings)
        assert METHODS[made.name](**made.settings()) == made
        with pytest.raises(AttributeError):
            made.anything = 1  # type: ignore[attr-defined]


def test_what_a_subclass_has_to_implement_says_so() -> None:
    for call in (
        lambda: Storage().quantize(torch.ones(1, 1)),
        lambda: Weight().storage,
        lambda: Weight()(torch.ones(1)),
        lambda: Weight().rows(torch.ones(1)),
        lambda: Weight().dense(),
        lambda: Weight().dtype,
        lambda: Update()(torch.ones(1), Weight()),
        lambda: Update().factors(Weight()),
        lambda: Method().build(Site("", "linear", 1, 1), Weight(), None),
    ):
        with pytest.raises(NotImplementedError):
            call()
    assert Update().penalty() is None
    assert Method().controller({}) is None
