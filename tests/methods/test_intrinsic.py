"""Training in an intrinsic space: trained parameters, invariants, files, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from cases import error, move
from models import IDS, logits
from sampled import pairs
from torch import Tensor, nn

import reparam
from reparam.core.registry import METHODS
from reparam.errors import FormatError
from reparam.inspect.summary import summarize
from reparam.methods.intrinsic import Intrinsic
from reparam.methods.intrinsic_update import Space, WeightUpdate
from reparam.methods.projections import Projection, key_of

KINDS = [{}, {"layout": "padded"}, {"projection": "dense"}, {"projection": "sparse"}]


def space_of(adapter: reparam.Adapter) -> Space:
    assert isinstance(adapter.shared, Space)
    return adapter.shared


def everything(method: Intrinsic, family: str = "gpt2") -> tuple[Any, reparam.Adapter]:
    """A model with all parameters adapted."""
    model = {"gpt2": models.gpt2, "llama": models.llama}[family]()
    reparam.untie(model)
    return model, reparam.attach(model, method, targets="everything", name="one")


def steps(model: nn.Module, adapter: reparam.Adapter, count: int, rate: float = 1e-2) -> list[float]:
    optimizer = torch.optim.Adam(adapter.parameters(), lr=rate)
    losses = []
    for _ in range(count):
        loss = models.loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("family", "mode", "settings"), pairs(["gpt2", "llama"], ["did", "said"], KINDS))
def test_everything_starts_at_the_base_and_trains(family: str, mode: str, settings: dict[str, Any]) -> None:
    """Also heads, embeddings, norms and biases; exactly d numbers are trained."""
    model, adapter = everything(Intrinsic(d=120, mode=mode, **settings), family)
    with reparam.select(model, None):
        base = logits(model)
    assert torch.equal(logits(model), base)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 120
    losses = steps(model, adapter, 4, 2e-2)
    assert losses[-1] < losses[0]
    moved = {name for name, update in adapter.updates.items() if update.moved().any()}  # type: ignore[operator]
    assert moved == set(adapter.sites)


def test_everything_is_every_parameter() -> None:
    """The change of each tensor by merging is λ P_i θ, by the tensor's seed and name."""
    base = {k: v.clone() for k, v in models.gpt2().state_dict().items()}
    model, adapter = everything(Intrinsic(d=90, mode="said", seed=4))
    move(adapter, 1)
    space = space_of(adapter)
    theta, groups, scale = space.theta.detach(), list(space.groups), space.scale
    assert scale is not None
    factors = dict(zip(groups, scale.tolist(), strict=True))
    before = logits(model)
    reparam.merge(model)
    assert error(logits(model), before) < 1e-5
    after = model.state_dict()
    assert factors.keys() == {name for name in after if name in dict(model.named_parameters())}
    for name in factors:
        flat = Projection("fastfood", key_of(4, name), len(theta), base[name].numel())(theta) * factors[name]
        found = after[name] - base[name]
        turned = base[name].ndim == 2 and "c_" in name  # Conv1D keeps [I, O]
        torch.testing.assert_close(found.t().flatten() if turned else found.flatten(), flat, rtol=0, atol=2e-6)


@pytest.mark.parametrize("groups", ["tensor", "module", "block"])
def test_said_with_factors_of_one_is_did(groups: str) -> None:
    """With d smaller by the number of groups."""
    model, adapter = everything(Intrinsic(d=100, mode="said", said_groups=groups))
    m = len(space_of(adapter).groups)
    twin, other = everything(Intrinsic(d=100 - m))
    values = torch.randn(100 - m, generator=torch.Generator().manual_seed(2)) * 0.1
    with torch.no_grad():
        space_of(adapter).theta.copy_(values)
        space_of(other).theta.copy_(values)
    assert torch.equal(logits(model), logits(twin))
    gradients = []
    for one, handle in ((model, adapter), (twin, other)):
        models.loss(one).backward()
        gradients.append(space_of(handle).theta.grad)
    assert torch.equal(*gradients)


def test_groups() -> None:
    names = ["h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias", "h.1.ln_1.weight", "wte.weight"]
    expected = {
        "tensor": names,
        "module": ["h.0.attn.c_attn", "h.0.attn.c_attn", "h.1.ln_1", "wte"],
        "block": ["h.0", "h.0", "h.1", ""],
    }
    for groups, found in expected.items():
        assert [Intrinsic(said_groups=groups).group(name) for name in names] == found


def test_the_gradient_is_the_sum_over_sites() -> None:
    """∂L/∂θ = Σ λ Pᵀ g and ∂L/∂λ = ⟨g, P θ⟩, with g from a plain model whose weights are the merged ones."""
    model, adapter = everything(Intrinsic(d=80, mode="said"))
    move(adapter, 3)
    space = space_of(adapter)
    models.loss(model).backward()
    found, found_scale = space.theta.grad, space.scale.grad  # type: ignore[union-attr]
    theta, scale, groups = space.theta.detach(), space.scale.detach(), list(space.groups)  # type: ignore[union-attr]
    reparam.merge(model)
    model.requires_grad_()
    models.loss(model).backward()
    expected, expected_scale = torch.zeros_like(theta), torch.zeros_like(scale)
    for name, parameter in model.named_parameters():
        g = parameter.grad
        g = g.t().flatten() if parameter.ndim == 2 and "c_" in name else g.flatten()
        p = Projection("fastfood", key_of(0, name), len(theta), g.numel())
        expected += scale[groups.index(name)] * p.adjoint(g)
        expected_scale[groups.index(name)] = g @ p(theta)
    assert error(found, expected) < 1e-4
    assert error(found_scale, expected_scale) < 1e-4


def test_nothing_of_the_size_of_a_matrix_is_kept_for_backward() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    adapter = reparam.attach(model, Intrinsic(d=30, mode="said"))
    move(adapter, 1)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = model(x)
    y.sum().backward()
    assert max(kept) <= 5 * 96


@pytest.mark.filterwarnings("ignore:intrinsic. d=60 is more")
def test_enough_numbers_reach_any_matrix() -> None:
    """A linear regression is solved exactly when d is large enough, and not with fewer than the number of weights."""
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(40, 6, generator=g, dtype=torch.float64), torch.randn(5, 6, generator=g).double()
    losses = {}
    for d in (10, 60):
        model = nn.Linear(6, 5, bias=False).double()
        nn.init.zeros_(model.weight)
        holder = nn.Sequential(model)
        adapter = reparam.attach(holder, Intrinsic(d=d), targets=["0"])
        holder.double()
        theta = space_of(adapter).theta
        optimizer = torch.optim.LBFGS([theta], max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-14)

        def closure(holder: nn.Module = holder, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (holder(x) - x @ target.T).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        losses[d] = float(closure().detach())
    assert losses[60] < 1e-8 < 1e-2 < losses[10]


@pytest.mark.parametrize("space", ["weight", "factor"])
def test_a_seed_and_d_numbers_are_the_adapter(space: str, tmp_path: Path) -> None:
    model, adapter = everything(Intrinsic(d=64, mode="said", said_groups="block", space=space, seed=3))
    steps(model, adapter, 3)
    adapter.save(tmp_path / "a")
    assert {k: v.numel() for k, v in adapter.tensors().items()} == {
        "reparam_shared.theta": 64 - len(space_of(adapter).groups),
        "reparam_shared.scale": len(space_of(adapter).groups),
    }
    other = models.gpt2()
    reparam.untie(other)
    again = reparam.load(other, tmp_path / "a", name="again")
    assert torch.equal(logits(other), logits(model))
    assert isinstance(again.method, Intrinsic)
    assert again.method.biased
    assert dataclasses.replace(again.method, biased=()) == adapter.method


def test_a_file_is_described_without_its_base(tmp_path: Path) -> None:
    """Also for λ of biases, which the file describes only through its settings."""
    _, adapter = everything(Intrinsic(d=90, mode="said"))
    move(adapter, 1)
    adapter.save(tmp_path / "a")
    found = summarize(tmp_path / "a", models.gpt2())
    for site in found.sites:
        update = adapter.updates[site.name]
        assert isinstance(update, WeightUpdate)
        assert site.change == pytest.approx(float(update.moved().norm()), rel=1e-4)
        offset = update.bias_delta()
        assert site.offset == pytest.approx(0 if offset is None else float(offset.norm()), rel=1e-4)
    assert sum(site.offset > 0 for site in found.sites) > 3


def test_another_seed_or_order_of_wrapping() -> None:
    def moved(method: Intrinsic, targets: list[str]) -> Tensor:
        model = models.llama()
        adapter = reparam.attach(model, method, targets=targets)
        with torch.no_grad():
            space_of(adapter).theta.fill_(0.1)
        update = adapter.updates["model.layers.1.self_attn.q_proj"]
        assert isinstance(update, WeightUpdate)
        return update.moved()

    one = moved(Intrinsic(d=20), ["q_proj"])
    assert torch.equal(one, moved(Intrinsic(d=20), ["mlp", "q_proj"]))
    assert not torch.equal(one, moved(Intrinsic(d=20, seed=1), ["q_proj"]))


def test_biases_may_stay() -> None:
    model = models.gpt2()
    adapter = reparam.attach(model, Intrinsic(d=20, bias=False), targets="all-linear")
    assert all(update.bias_delta() is None for update in adapter.updates.values())
    adapter = reparam.attach(models.gpt2(), Intrinsic(d=20), targets="all-linear")
    assert all(update.bias_delta() is not None for update in adapter.updates.values())


def test_a_mixed_batch_with_biases_and_norms() -> None:
    model = models.gpt2()
    adapter = reparam.attach(model, Intrinsic(d=60), targets=["all-linear", "ln_1", "ln_f", "wte"], name="one")
    move(adapter, 1)
    alone = logits(model)
    with torch.no_grad(), reparam.select(model, ["one", None, "one"]):
        mixed = logits(model)
    with reparam.select(model, None):
        base = logits(model)
    for row, expected in enumerate((alone[0], base[1], alone[2])):
        assert error(mixed[row], expected) < 1e-5
    assert IDS.shape[0] == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"d": 0}, "d=0: expected a whole number"),
        ({"d": 10.0}, "d=10.0"),
        ({"d": True}, "d=True"),
        ({"mode": "both"}, "mode='both'"),
        ({"projection": "fourier"}, "projection='fourier'"),
        ({"layout": "padded", "projection": "dense"}, "layout='padded' needs projection"),
        ({"space": "factor", "r": 0}, "r=0"),
        ({"said_groups": "model"}, "said_groups='model'"),
        ({"projection_version": 99}, "projection_version=99.*do not fit them"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Intrinsic(**settings)


def test_said_needs_more_numbers_than_groups() -> None:
    model = models.llama()
    with pytest.raises(ValueError, match=r"each of 14 groups, and d=14 leaves none for θ"):
        reparam.attach(model, Intrinsic(d=14, mode="said"), targets="all-linear")
    assert reparam.adapters(model) == {}
    reparam.attach(model, Intrinsic(d=15, mode="said"), targets="all-linear")


def test_more_numbers_than_weights_are_warned_of() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="d=13 is more than the 12 numbers"):
        reparam.attach(model, Intrinsic(d=13), targets=["0"])


def test_tied_weights_are_projected_once() -> None:
    """As a target, a tied weight is refused; "everything" leaves out the tied head, with a warning."""
    model = models.llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="shares its weight"):
        reparam.attach(model, Intrinsic(d=20), targets=["embed_tokens"])
    with pytest.warns(UserWarning, match="shares its weight"):
        adapter = reparam.attach(model, Intrinsic(d=20), targets="everything")
    assert "lm_head" not in adapter.sites


def test_files_of_other_maps_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by their version, though the file is intact and its digests match."""
    model, adapter = everything(Intrinsic(d=20))
    monkeypatch.setattr("reparam.methods.intrinsic.VERSION", 2)
    adapter.method = dataclasses.replace(adapter.method, projection_version=2)
    adapter.save(tmp_path / "a")
    monkeypatch.undo()
    reparam.remove(model, "one")
    with pytest.raises(FormatError, match="version 1 of the random maps"):
        reparam.load(model, tmp_path / "a")


def test_it_is_registered_and_said_in_words() -> None:
    assert METHODS["intrinsic"] is Intrinsic
    _, adapter = everything(Intrinsic(d=33))
    assert "33 parameters" in str(adapter)
