"""One site: every setting of every method, on every storage, on every kind of layer.

The oracle and the differences run on a sample of all combinations, in which every setting meets every kind of layer and
every storage. The other tests run every method on every kind of layer, and on one quantized storage. With
`REPARAM_TESTS=full` (`make full`) all run on all combinations.

The oracle is `torch.nn.utils.parametrize`: a plain module whose matrix is `factors.apply(W)`, in float64.
"""

from typing import Any

import pytest
import torch
from cases import EVERYWHERE, PAIRS, SAMPLE, One, error, has_factors, move, one, starts_exactly
from sampled import FULL
from torch import Tensor, nn
from torch.nn.utils import parametrize

from reparam.core.base import Update, Weight
from reparam.core.method import Method
from reparam.methods import dora
from reparam.sites.module import Adapted


def on(cases: list[tuple[Any, str, str]]) -> pytest.MarkDecorator:
    """Run a test on these settings, kinds of layer and storages."""
    found = [pytest.param(*s.values, kind, storage, id=f"{s.id}-{kind}-{storage}") for s, kind, storage in cases]
    return pytest.mark.parametrize(("method", "kind", "storage"), found)


everywhere = on(PAIRS)
sampled = on(EVERYWHERE if FULL else SAMPLE)


class Changed(nn.Module):
    """Parametrization W -> factors.apply(W), differentiated by autograd."""

    def __init__(self, update: Update, weight: Weight) -> None:
        super().__init__()
        self.parts = (update, weight)

    def forward(self, W: Tensor) -> Tensor:
        update, weight = self.parts
        return update.factors(weight).apply(W)


class Biased(nn.Module):
    """Parametrization b -> the adapter's bias, differentiated by autograd."""

    def __init__(self, layer: Adapted) -> None:
        super().__init__()
        self.parts = (layer,)

    def forward(self, b: Tensor) -> Tensor:
        (layer,) = self.parts
        own, offset = layer.biases.get("one", b), layer.updates["one"].bias_delta()
        return own if offset is None else own + offset


def oracle(model: One) -> nn.Module:
    """A plain module with the matrix W' and the bias of the adapted layer of `model`."""
    layer = model.q_proj
    matrix = layer.frozen.dense().double()
    if model.kind == "embedding":
        plain: nn.Module = nn.Embedding(*matrix.shape).double()
    else:
        plain = nn.Linear(matrix.shape[1], matrix.shape[0]).double()
        bias = torch.zeros(matrix.shape[0]) if layer.bias is None else layer.bias.detach()
        plain.bias = nn.Parameter(bias.double(), requires_grad=False)
        parametrize.register_parametrization(plain, "bias", Biased(layer))
    plain.weight = nn.Parameter(matrix, requires_grad=False)
    parametrize.register_parametrization(plain, "weight", Changed(layer.updates["one"], layer.frozen))
    return plain


def gradients(module: nn.Module, x: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """The output, and gradients of a fixed weighted sum of it for x (if differentiable) and the parameters."""
    wanted = [x.requires_grad_()] if x.is_floating_point() else []
    y = module(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return y, list(torch.autograd.grad((y * weights).sum(), [*wanted, *parameters]))


@sampled
def test_a_fresh_adapter_changes_nothing(kind: str, storage: str, method: Method) -> None:
    """Bit for bit, if the factors add exactly zero."""
    model, adapter = one(kind, method, storage)
    layer, x = model.q_proj, model.input(4, 3)
    y = model(x)
    layer.active = None
    base = model(x)
    assert error(y, base) < 1e-6
    if starts_exactly(adapter):
        assert torch.equal(y, base)


@everywhere
def test_the_output_and_all_gradients_are_those_of_the_oracle(kind: str, storage: str, method: Method) -> None:
    model, adapter = one(kind, method, storage)
    if not has_factors(adapter):
        pytest.skip("an update that depends on its input has no factors")
    move(adapter, 1, size=0.3)
    model.double().eval()
    x = model.input(4, 3, dtype=torch.float64)
    y, found = gradients(model, x, adapter.parameters())
    expected_y, expected = gradients(oracle(model), x, adapter.parameters())
    small = 1e-12 if y.dtype == torch.float64 else 1e-5
    assert error(y, expected_y) < small
    names = ["x"] * x.is_floating_point() + [name for name, _, _ in adapter.named_parameters()]
    assert {n: e for n, f, g in zip(names, found, expected, strict=True) if (e := error(f, g)) >= small} == {}
    model.q_proj.active = None
    assert error(y, model(x)) > 1e-3  # the update does something here


@everywhere
def test_gradients_are_those_of_differences(
    kind: str, storage: str, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with finite differences, also for updates that depend on their input.

    DoRA's norms are constants of its backward pass by default, so the differences keep those of the first forward.
    """
    monkeypatch.setattr(dora, "trusted", lambda: True)
    model, adapter = one(kind, method, storage)
    move(adapter, 2)
    model.double().eval()
    x = model.input(2, dtype=torch.float64)
    if model(x).dtype != torch.float64:
        assert storage != "dense"
        pytest.skip("the storage computes in less than float64")
    parameters = adapter.parameters()
    wanted = (x.requires_grad_(), *parameters) if x.is_floating_point() else tuple(parameters)
    assert torch.autograd.gradcheck(lambda *_: model(x), wanted, fast_mode=True)


@sampled
def test_every_parameter_has_a_gradient_away_from_the_start(kind: str, storage: str, method: Method) -> None:
    model, adapter = one(kind, method, storage)
    model.train()
    move(adapter, 1)
    model(model.input(4, 3)).square().sum().backward()
    assert [name for name, p, _ in adapter.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@sampled
def test_any_leading_shape_gives_the_rows_of_the_flat_batch(kind: str, storage: str, method: Method) -> None:
    if getattr(method, "router", "") == "sequence":
        pytest.skip("what an output depends on is the whole row that its input is in")
    model, adapter = one(kind, method, storage)
    move(adapter, 3)
    model.eval()
    width = 12 if kind == "embedding" else 20
    for leading in [(), (1,), (5,), (0,), (2, 3), (2, 0), (2, 3, 4)]:
        x = model.input(*leading)
        y = model(x)
        assert y.shape == (*leading, width)
        if x.numel():
            flat = x.reshape(-1) if kind == "embedding" else x.reshape(-1, 12)
            assert error(y.reshape(-1, width), model(flat)) < 1e-6


@sampled
def test_a_batch_that_is_not_contiguous_gives_the_same(kind: str, storage: str, method: Method) -> None:
    model, adapter = one(kind, method, storage)
    move(adapter, 4)
    model.eval()
    x = model.input(6, 4)
    for view in (x.transpose(0, 1), x[::2], x[:1].expand(3, *x.shape[1:])):
        y, found = gradients(model, view.detach(), adapter.parameters())
        whole, expected = gradients(model, view.detach().contiguous(), adapter.parameters())
        assert error(y, whole) < 1e-6
        assert max(error(f, g) for f, g in zip(found, expected, strict=True)) < 1e-5


@sampled
def test_the_input_is_not_written_to(kind: str, storage: str, method: Method) -> None:
    model, adapter = one(kind, method, storage)
    move(adapter, 5)
    x = model.input(4, 3)
    before = x.clone()
    gradients(model, x, adapter.parameters())
    assert torch.equal(x, before)


@sampled
def test_roles_name_every_parameter(kind: str, storage: str, method: Method) -> None:
    _, adapter = one(kind, method, storage)
    for update in adapter.updates.values():
        assert {name for name, _ in update.named_parameters()} == set(update.roles)
        assert set(update.roles.values()) <= {"in", "out", "core", "gain", "route"}
        assert all(p.dtype == torch.float32 for p in update.parameters())


@sampled
def test_the_update_holds_none_of_the_base(kind: str, storage: str, method: Method) -> None:
    model, adapter = one(kind, method, storage)
    base = {p.data_ptr() for p in model.q_proj.frozen.held()}
    assert not base & {p.data_ptr() for p in adapter.parameters()}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(p.numel() for p in adapter.parameters())
