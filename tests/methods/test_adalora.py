"""AdaLoRA: the schedule, the importance, the choice of components, and the orthogonality term."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from adalora_cases import SHORT, adapted, living, ranks, step, svd
from hypothesis import given
from hypothesis import strategies as st
from models import logits
from torch import Tensor

import reparam
from reparam import AdaLoRA
from reparam.methods.adalora.budget import Budget, Schedule
from reparam.methods.adalora.update import SVDUpdate
from reparam.methods.dora import DoRAUpdate

# ---- the schedule


def test_the_schedule_is_the_released_codes() -> None:
    """Golden values: two matrices, rank 6 to 4, 40 steps. The paper's formula would go from 18.98 to 8.34."""
    plan = Schedule(40, 5, 10, 5)
    expected = [12] * 6 + [11] * 2 + [10] * 3 + [9] * 4 + [8] * 25
    assert [plan.budget(t, 12, 8) for t in range(40)] == expected
    assert [t for t in range(40) if plan.masks(t)] == [10, 15, 20, 25, *range(30, 40)]


@given(
    total=st.integers(1, 300),
    tinit=st.integers(0, 100),
    tfinal=st.integers(0, 100),
    every=st.integers(1, 20),
    ends=st.tuples(st.integers(0, 90), st.integers(0, 90)),
)
def test_the_budget_falls_from_first_to_last(
    total: int, tinit: int, tfinal: int, every: int, ends: tuple[int, int]
) -> None:
    method = AdaLoRA(tinit=tinit, tfinal=tfinal, delta_t=every)
    if total <= tinit + tfinal:
        with pytest.raises(ValueError, match=f"{total} steps are too few"):
            method.plan(total)
        return
    plan, last, first = method.plan(total), *sorted(ends)
    budgets = [plan.budget(t, first, last) for t in range(total)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == (first if plan.final > 0 else last)
    assert budgets[-1] == budgets[plan.final] == last
    assert plan.masks(plan.final)


def test_by_default_a_sixth_and_a_half() -> None:
    plan = AdaLoRA().plan(3000)
    assert (plan.tinit, plan.tfinal) == (500, 1500)


# ---- importance and choice


def test_importance_is_the_specs_golden_value() -> None:
    """Sensitivity 1, then 3, with 0.85: Ī .15, .5775; Ū .1275, .47175; product .019125, .272436."""
    _, adapter, budget = adapted(orth_weight=0.0)
    budget.plan(None)
    for sensitivity, product in ((1.0, 0.019125), (3.0, 0.272436)):
        with torch.no_grad():
            for update in svd(adapter).values():
                for parameter, _ in update.parts():
                    parameter.fill_(-2.0)
                    parameter.grad = torch.full_like(parameter, sensitivity / 2)
        budget._observe()
        found = budget.mean[0] * budget.deviation[0]
        assert torch.allclose(found, torch.full_like(found, product), atol=1e-6)


@pytest.mark.parametrize("score", ["after", "before"])
def test_scaling_the_loss_scales_importance_with_its_square(score: str) -> None:
    scores = []
    for factor in (1.0, 3.0):
        model, adapter, budget = adapted(orth_weight=0.0, score=score)
        adapter.bind(optimizer := torch.optim.SGD(adapter.parameters(), lr=0.0))
        with torch.no_grad():
            for update in svd(adapter).values():
                update.E.fill_(0.5)
        (factor * models.loss(model)).backward()
        optimizer.step()
        scores.append([m * d for m, d in zip(budget.mean, budget.deviation, strict=True)])
    for one, three in zip(*scores, strict=True):
        assert one.min() >= 0
        assert torch.allclose(9 * one, three, rtol=1e-3)


def test_means_do_not_grow_with_the_width() -> None:
    """Doubling the outputs with the same values does not change a component's importance."""
    found = []
    for copies in (1, 2):
        update = SVDUpdate(torch.ones(2, 3), torch.ones(4 * copies, 2), scale=1.0)
        budget = Budget(AdaLoRA(**SHORT), {"a": update})
        for parameter, _ in update.parts():
            parameter.grad = torch.ones_like(parameter)
        budget._observe()
        found.append((budget.mean[2] * budget.deviation[2]).mean(0))
    assert torch.equal(*found)


def test_exactly_the_budget_has_a_place_and_the_best_have_it() -> None:
    model, adapter, budget = adapted()
    adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=1e-2))
    assert budget.plan_ is not None
    for t in range(7):
        chosen: list[Tensor] = []
        budget._mask = lambda places, into=chosen: into.extend(places)  # type: ignore[method-assign, misc]
        before = copy.deepcopy(adapter.tensors())
        step(model, optimizer, seed=t)
        if chosen:
            products = [m * d for m, d in zip(budget.mean, budget.deviation, strict=True)]
            scores = torch.cat([e + a.mean(1) + b.mean(0) for e, a, b in zip(*[iter(products)] * 3, strict=True)])
            places = torch.cat(chosen)
            assert int(places.sum()) == budget.plan_.budget(t, budget.first, budget.last) < budget.first
            assert scores[places].min() >= scores[~places].max()
        assert before.keys() == adapter.tensors().keys()


def test_masking_changes_lambda_alone_and_exactly_so_many() -> None:
    model, adapter, budget = adapted(delta_t=3)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    adapter.bind(optimizer)
    for t in range(4):
        if t == 3:
            states = copy.deepcopy(optimizer.state_dict()["state"])
            found: dict[str, Any] = {}
            real = budget._mask

            def mask(places: list[Tensor], real: Any = real, found: dict[str, Any] = found) -> None:
                found["before"] = copy.deepcopy(adapter.tensors())
                found["states"] = copy.deepcopy(optimizer.state_dict()["state"])
                real(places)

            budget._mask = mask  # type: ignore[method-assign]
        step(model, optimizer, seed=t)
    assert living(adapter) == Schedule(10, 2, 3, 3).budget(3, budget.first, budget.last) < budget.first
    now = adapter.tensors()
    moved = {key.rpartition(".")[2] for key, tensor in now.items() if not torch.equal(tensor, found["before"][key])}
    assert moved == {"E"}
    assert states.keys() == found["states"].keys()
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, found["states"][index][key]) for key, value in state.items())
    step(model, optimizer, seed=9)  # step 4 masks nothing: what lost its place may grow again
    assert living(adapter) > Schedule(10, 2, 3, 3).budget(4, budget.first, budget.last)


def test_ties_leave_as_many_as_the_budget_has() -> None:
    """The released threshold may keep none of equal scores. Here the larger |λ| stays, then the first."""
    update = SVDUpdate(torch.ones(6, 3), torch.ones(4, 6), scale=1.0)
    budget = Budget(AdaLoRA(**SHORT), {"a": update})
    for parameter, _ in update.parts():
        parameter.grad = torch.zeros_like(parameter)
    budget._observe()
    with torch.no_grad():
        update.E.copy_(torch.tensor([0.1, -0.3, 0.1, 0.2, 0.1, 0.1]))
        budget._choose(4)
    assert update.E.tolist() == pytest.approx([0.1, -0.3, 0.1, 0.2, 0, 0])


def test_a_target_that_is_the_start_trains_as_it_is() -> None:
    model, adapter, _ = adapted(target_r=4)
    adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=1e-2))
    for t in range(10):
        step(model, optimizer, seed=t)
    assert ranks(adapter) == [4] * 14
    assert adapter.finish() is None


# ---- the orthogonality term


@pytest.mark.parametrize("form", ["reference", "paper"])
def test_the_term_is_the_gradient_of_its_formula(form: str) -> None:
    _, adapter, budget = adapted(orth_form=form, orth_weight=0.3)
    budget.plan(None)
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        budget._orthogonal()
    norms = []
    for update in svd(adapter).values():
        for v in (update.A, update.B.t()):
            off = v @ v.t() - torch.eye(len(v))
            norms.append(off.square().sum() if form == "paper" else off.norm() / (2 * len(ranks(adapter))))
    expected = torch.autograd.grad(0.3 * torch.stack(norms).sum(), adapter.parameters(), allow_unused=True)
    for (name, p, _), g in zip(adapter.named_parameters(), expected, strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, torch.zeros_like(p) if g is None else g, atol=1e-6), name


def test_the_term_has_no_gradient_where_all_is_orthonormal() -> None:
    update = SVDUpdate(torch.eye(2, 5), torch.eye(4, 2), scale=1.0)
    budget = Budget(AdaLoRA(**SHORT), {"a": update})
    for parameter, _ in update.parts():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        budget._orthogonal()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p, _ in update.parts() if p.grad is not None)


def test_the_reported_loss_is_the_tasks() -> None:
    losses = []
    for weight in (0.0, 10.0):
        model, adapter, _ = adapted(orth_weight=weight)
        adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=1e-2))
        losses.append(step(model, optimizer))
        assert adapter.penalty() is None
    assert losses[0] == losses[1]


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_r": 0}, "init_r=0: expected a whole number of at least 1"),
        ({"target_r": -1}, "target_r=-1: expected a finite number of at least 0"),
        ({"init_r": 4, "target_r": 5}, "target_r=5 is above init_r=4"),
        ({"delta_t": 0}, "delta_t=0: expected a whole number of at least 1"),
        ({"total_steps": 0}, "total_steps=0: expected a whole number of at least 1"),
        ({"tinit": -1}, "tinit=-1: expected a whole number of at least 0"),
        ({"beta1": 1.0}, "beta1=1.0: expected a number between 0 and 1"),
        ({"beta2": math.nan}, "beta2=nan: expected a number between 0 and 1"),
        ({"orth_weight": -0.1}, "orth_weight=-0.1: expected a finite number of at least 0"),
        ({"orth_form": "mean"}, "orth_form='mean': expected one of reference, paper"),
        ({"score": "late"}, "score='late': expected one of after, before"),
        ({"alpha": 0}, "alpha=0: expected a finite number above 0"),
        ({"dropout": 1.0}, r"dropout=1.0: expected a probability in \[0, 1\)"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern '\\(' is not a valid regular expression"),
        ({"total_steps": 10, "tinit": 5, "tfinal": 5}, "10 steps are too few for tinit=5 and tfinal=5"),
        ({"total_steps": 10, "tinit": 2, "tfinal": 5, "milestones": (6,)}, "milestones=.* 6 is outside of the fall"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoRA(**settings)


def test_the_number_of_steps_is_asked_for() -> None:
    _, adapter, _ = adapted(total_steps=None)
    optimizer = torch.optim.AdamW(adapter.parameters())
    with pytest.raises(ValueError, match=r"needs the number of optimizer steps.*total_steps=\.\.\."):
        adapter.bind(optimizer)
    with pytest.raises(ValueError, match="5 steps are too few for tinit=2 and tfinal=3"):
        adapter.bind(optimizer, total_steps=5)
    adapter.bind(optimizer, total_steps=6)
    _, adapter, _ = adapted()
    with pytest.raises(ValueError, match="total_steps=10, but the run has 11 steps"):
        adapter.bind(torch.optim.AdamW(adapter.parameters()), total_steps=11)


def test_gradients_that_are_missing_stop_the_step() -> None:
    model, adapter, _ = adapted()
    adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=1e-2))
    models.loss(model).backward()
    next(iter(svd(adapter).values())).A.grad = None
    before = copy.deepcopy(adapter.tensors())
    with pytest.raises(ValueError, match=r"1 of 14 sites have no gradient \(first: model.layers.0.self_attn.q_proj\)"):
        optimizer.step()
    assert models.same(adapter.tensors(), before)


def test_nan_is_refused() -> None:
    model, adapter, _ = adapted(tinit=0)
    adapter.bind(optimizer := torch.optim.SGD(adapter.parameters(), lr=1e-2))
    step(model, optimizer)
    models.loss(model).backward()
    next(iter(svd(adapter).values())).A.grad.fill_(math.nan)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="NaN or infinite"):
        optimizer.step()


def test_a_run_that_ends_early_says_so() -> None:
    model, adapter, _ = adapted()
    assert "no step was made" in str(adapter.finish())
    adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=1e-2))
    for t in range(4):
        step(model, optimizer, seed=t)
    budget = Schedule(10, 2, 3, 1).budget(3, 56, 28)
    assert f"ended after 4 of 10 steps, before the ranks were final: the budget was {budget}" in str(adapter.finish())


def test_saving_what_no_optimizer_was_bound_to_warns(tmp_path: Path) -> None:
    _, adapter, _ = adapted()
    with pytest.warns(UserWarning, match="no optimizer was bound"):
        adapter.save(tmp_path / "a")
    fresh = models.llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reparam.load(fresh, tmp_path / "a").save(tmp_path / "b")


def test_magnitudes_lie_over_it() -> None:
    model, adapter, _ = adapted(magnitude=True)
    assert all(isinstance(update, DoRAUpdate) for update in adapter.updates.values())
    adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=1e-2))
    for t in range(10):
        step(model, optimizer, seed=t)
    expected = logits(model.eval())
    reparam.merge(model)
    assert (logits(model) - expected).abs().max() < 1e-4
