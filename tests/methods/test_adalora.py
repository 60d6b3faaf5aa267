"""AdaLoRA: the schedule, the importance, the choice; ranks that shrink for real; any optimizer and loop; PEFT."""

import copy
import io
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import IDS, logits
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import reparam
from reparam import AdaLoRA
from reparam.adapter.load import fill
from reparam.io import files
from reparam.methods.adalora.budget import Budget, Plan
from reparam.methods.adalora.update import SVDUpdate, components
from reparam.methods.dora import DoRAUpdate
from reparam.optim import PagedAdamW, lora_plus
from reparam.train.config import resolve
from reparam.train.run import train
from reparam.train.show import Show

SHORT = {"init_r": 4, "target_r": 2, "alpha": 64, "total_steps": 10, "tinit": 2, "tfinal": 3}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "paged, 32 bits": lambda p: PagedAdamW(p, lr=1e-2, page=2**13, budget=2**14),
    "paged, 8 bits": lambda p: PagedAdamW(p, lr=1e-2, bits=8),
}


def adapted(model: nn.Module | None = None, **settings: Any) -> tuple[Any, reparam.Adapter, Budget]:
    model = models.llama() if model is None else model
    adapter = reparam.attach(model, AdaLoRA(**{**SHORT, **settings}))
    assert isinstance(adapter.controller, Budget)
    return model, adapter, adapter.controller


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int = 0, micro: int = 1) -> float:
    """One optimizer step on random rows, over several micro-batches."""
    draw = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(micro):
        loss = models.loss(model, torch.randint(0, 90, (2, 6), generator=draw)) / micro
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def svd(adapter: reparam.Adapter) -> dict[str, SVDUpdate]:
    return {name: components(update) for name, update in adapter.updates.items()}


def ranks(adapter: reparam.Adapter) -> list[int]:
    return [len(update.E) for update in svd(adapter).values()]


def living(adapter: reparam.Adapter) -> int:
    return sum(int((update.E != 0).sum()) for update in svd(adapter).values())


# ---- the schedule


def test_the_schedule_is_the_released_codes() -> None:
    """Golden: two matrices, rank 6 to 4, 40 steps. The appendix' formula would begin at 18.98 and end at 8.34."""
    plan = Plan(40, 5, 10, 5)
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
    """Twice the outputs, with the same numbers in them, leave a component as important as it was."""
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
    assert living(adapter) == Plan(10, 2, 3, 3).budget(3, budget.first, budget.last) < budget.first
    now = adapter.tensors()
    moved = {key.rpartition(".")[2] for key, tensor in now.items() if not torch.equal(tensor, found["before"][key])}
    assert moved == {"E"}
    assert states.keys() == found["states"].keys()
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, found["states"][index][key]) for key, value in state.items())
    step(model, optimizer, seed=9)  # step 4 masks nothing: what lost its place may grow again
    assert living(adapter) > Plan(10, 2, 3, 3).budget(4, budget.first, budget.last)


def test_ties_leave_as_many_as_the_budget_has() -> None:
    """The released threshold keeps none of equal scores. Here the larger |λ| stays, then whoever comes first."""
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


# ---- shrinking


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "magnitude"])
def test_what_lost_its_place_is_gone_and_the_function_stays(kind: str, magnitude: bool, tmp_path: Path) -> None:
    model, adapter, budget = adapted(magnitude=magnitude)
    optimizer = OPTIMIZERS[kind](adapter.parameters())
    adapter.bind(optimizer)
    held = adapter.parameters()
    for t in range(10):
        if t == 7:
            assert sum(ranks(adapter)) == 56
            real = budget._drop

            def drop(places: list[Tensor], made: Any, real: Any = real) -> None:
                before = logits(model.eval())
                real(places, made)
                after = logits(model.eval())
                model.train()
                assert (before - after).abs().max() <= 1e-5 * before.abs().max()

            budget._drop = drop  # type: ignore[method-assign]
        step(model, optimizer, seed=t, micro=1 + t % 2)
    assert sum(ranks(adapter)) == 28 == living(adapter)
    assert len(set(ranks(adapter))) > 1
    assert all(one is two for one, two in zip(adapter.parameters(), held, strict=True)), "the same parameter objects"
    assert not budget.mean, "statistics are let go"
    states = optimizer.state_dict()["state"]
    for index, parameter in enumerate(adapter.parameters()):
        for key in ("exp_avg", "momentum_buffer"):
            assert key not in states.get(index, {}) or states[index][key].shape == parameter.shape
    assert adapter.finish() is None
    expected = logits(model.eval())
    adapter.save(tmp_path / "a")
    fresh = models.llama()
    reparam.load(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh.eval()), expected)
    assert sum(p.numel() for p in reparam.adapters(fresh)["default"].parameters()) == sum(
        p.numel() for p in adapter.parameters()
    )
    for update in svd(adapter).values():
        assert update.scale == pytest.approx(64 / 4.00001)


def test_a_site_may_end_with_nothing() -> None:
    model, adapter, _ = adapted(target_r=0.25)
    adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=1e-2))
    for t in range(10):
        step(model, optimizer, seed=t)
    assert 0 in ranks(adapter)
    assert sum(ranks(adapter)) == round(0.25 * 14)
    expected = logits(model.eval())
    with reparam.select(model, ["default", None]):
        mixed = logits(model, IDS[:1].repeat(2, 1))
    assert (mixed[0] - logits(model, IDS[:1])[0]).abs().max() < 1e-5
    reparam.merge(model)
    assert (logits(model) - expected).abs().max() < 1e-4


def test_milestones_drop_for_good() -> None:
    model, adapter, budget = adapted(milestones=(4,))
    adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=1e-2))
    sizes = []
    for t in range(10):
        step(model, optimizer, seed=t)
        sizes.append(sum(ranks(adapter)))
    plan = Plan(10, 2, 3, 1)
    assert sizes == [56] * 4 + [plan.budget(4, 56, 28)] * 3 + [28] * 3
    assert budget.packed


def test_states_that_cannot_follow_stay_and_are_masked_until_the_end() -> None:
    model, adapter, budget = adapted()
    optimizer = torch.optim.Adafactor(adapter.parameters(), lr=1e-2)  # keeps rows and columns of its mean squares
    adapter.bind(optimizer)
    for t in range(10):
        step(model, optimizer, seed=t)
        if t >= 7:
            assert living(adapter) == 28
    assert sum(ranks(adapter)) == 56
    assert not budget.packed
    before = logits(model.eval())
    assert adapter.finish() is None
    assert sum(ranks(adapter)) == 28
    assert (logits(model) - before).abs().max() < 1e-5


def test_the_choice_stands_at_the_end() -> None:
    model, adapter, _ = adapted(tfinal=5, tinit=1)
    adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=1e-2))
    seen = []
    for t in range(14):  # longer than it was told: nothing more happens to ranks
        step(model, optimizer, seed=t)
        seen.append(ranks(adapter))
    assert all(found == seen[5] for found in seen[5:])
    assert seen[4] != seen[5]


# ---- loops and states


def test_accumulation_moves_the_budget_once_a_step() -> None:
    model, adapter, budget = adapted()
    adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=1e-2))
    step(model, optimizer, micro=4)
    assert budget.step == 1


def test_lora_plus_trains_p_faster() -> None:
    model, adapter, _ = adapted()
    groups = lora_plus(adapter.named_parameters(), adapter.sites, lr=1e-3, ratio=16)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {role: rates[id(p)] for _, p, role in adapter.named_parameters()} == {"in": 1e-3, "core": 1e-3, "out": 0.016}
    adapter.bind(optimizer := torch.optim.AdamW(groups))
    for t in range(10):
        step(model, optimizer, seed=t)
    assert sum(ranks(adapter)) == 28


@pytest.mark.parametrize("kind", ["adamw", "paged, 32 bits", "paged, 8 bits"])
@pytest.mark.parametrize("stop", [2, 5, 7, 8])
def test_going_on_from_saved_states_is_the_same_run(kind: str, stop: int, tmp_path: Path) -> None:
    """Bit for bit, before, in the middle of and after the fall of the budget."""

    def fresh() -> tuple[Any, reparam.Adapter, Budget, torch.optim.Optimizer]:
        model, adapter, budget = adapted()
        return model, adapter, budget, OPTIMIZERS[kind](adapter.parameters())

    model, adapter, budget, optimizer = fresh()
    adapter.bind(optimizer)
    for t in range(stop):
        step(model, optimizer, seed=t)
    adapter.save(tmp_path / "a")
    saved = copy.deepcopy(budget.state_dict()), copy.deepcopy(optimizer.state_dict())
    for t in range(stop, 10):
        step(model, optimizer, seed=t)
    again, twin, its_budget, _ = fresh()
    fill(twin, files.read(tmp_path / "a"), tmp_path / "a")
    its_budget.load_state_dict(saved[0])
    its_optimizer = OPTIMIZERS[kind](twin.parameters())
    its_optimizer.load_state_dict(saved[1])
    twin.bind(its_optimizer)
    for t in range(stop, 10):
        step(again, its_optimizer, seed=t)
    found, expected = twin.tensors(), adapter.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_states_of_other_sites_and_ranks_are_refused() -> None:
    model, adapter, budget = adapted()
    adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=1e-2))
    for t in range(4):
        step(model, optimizer, seed=t)
    other = reparam.attach(models.llama(), AdaLoRA(**SHORT), targets=["q_proj"]).controller
    assert other is not None
    with pytest.raises(ValueError, match="of other sites"):
        other.load_state_dict(budget.state_dict())
    higher = reparam.attach(models.llama(), AdaLoRA(**{**SHORT, "init_r": 5})).controller
    assert higher is not None
    with pytest.raises(ValueError, match="mean are of other ranks"):
        higher.load_state_dict(budget.state_dict())


# ---- judged by PEFT


def test_a_run_is_pefts_run() -> None:
    """The same start, batches and steps: P, λ and Q agree with PEFT's after each step of the fall."""
    settings = {"init_r": 4, "tinit": 2, "tfinal": 3, "beta1": 0.85, "beta2": 0.85}
    config = peft.AdaLoraConfig(
        **settings,  # type: ignore[arg-type]
        target_r=2,
        deltaT=1,
        total_step=12,
        orth_reg_weight=0.4,
        lora_alpha=64,
        target_modules=["q_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",  # without it PEFT leaves the orthogonality term out
    )
    judge = peft.get_peft_model(models.llama(), config)
    model = models.llama()
    adapter = reparam.attach(
        model,
        AdaLoRA(**{**settings, "target_r": 2, "alpha": 64, "total_steps": 12, "orth_weight": 0.4}),
        targets=["q_proj", "up_proj", "down_proj"],
    )
    theirs = {
        f"{name}.{part}": getattr(judge.base_model.model.get_submodule(name), f"lora_{part}")["default"]
        for name in adapter.sites
        for part in "AEB"
    }
    with torch.no_grad():
        for name, p, _ in adapter.named_parameters():
            theirs[name].copy_(p.reshape(theirs[name].shape))
    ours = torch.optim.SGD(adapter.parameters(), lr=0.2)
    its = torch.optim.SGD([p for p in judge.parameters() if p.requires_grad], lr=0.2)
    adapter.bind(ours)
    for t in range(9):
        ids = torch.randint(0, 90, (2, 6), generator=torch.Generator().manual_seed(t))
        for net, optimizer in ((model, ours), (judge, its)):
            net(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            if net is judge:
                judge.base_model.update_and_allocate(t)
            optimizer.zero_grad()
        for name, p, _ in adapter.named_parameters():
            expected = theirs[name].detach().reshape(p.shape)
            assert torch.allclose(p, expected, rtol=1e-3, atol=1e-6), (t, name)


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
        ({"rank_pattern": {"(": 2}}, "rank_pattern '\\(' is no regular expression"),
        ({"total_steps": 10, "tinit": 5, "tfinal": 5}, "10 steps are too few for tinit=5 and tfinal=5"),
        ({"total_steps": 10, "tinit": 2, "tfinal": 5, "milestones": (6,)}, "milestones=.* and 6 is not in between"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoRA(**settings)


def test_the_number_of_steps_is_asked_for() -> None:
    _, adapter, _ = adapted(total_steps=None)
    optimizer = torch.optim.AdamW(adapter.parameters())
    with pytest.raises(ValueError, match=r"the number of optimizer steps is not known.*total_steps=\.\.\."):
        adapter.bind(optimizer)
    with pytest.raises(ValueError, match="5 steps are too few for tinit=2 and tfinal=3"):
        adapter.bind(optimizer, total_steps=5)
    adapter.bind(optimizer, total_steps=6)
    _, adapter, _ = adapted()
    with pytest.raises(ValueError, match="total_steps=10, and the run has 11 steps"):
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
    budget = Plan(10, 2, 3, 1).budget(3, 56, 28)
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


# ---- PEFT's files


def shrunk(**settings: Any) -> tuple[Any, reparam.Adapter]:
    """A model after a whole schedule, its sites of different ranks."""
    make = settings.pop("make", models.llama)
    model, adapter, _ = adapted(make(), **settings)
    adapter.bind(optimizer := torch.optim.AdamW(adapter.parameters(), lr=3e-2))
    for t in range(10):
        step(model, optimizer, seed=t)
    return model.eval(), adapter


@pytest.mark.parametrize("make", [models.llama, models.gpt2])
@pytest.mark.parametrize("target", [2, 0.5])
def test_peft_computes_what_we_saved(make: Any, target: float, tmp_path: Path) -> None:
    model, adapter = shrunk(make=make, target_r=target)
    assert len(set(ranks(adapter))) > 1
    expected = logits(model)
    adapter.save(tmp_path / "out", format="peft")
    judge = peft.PeftModel.from_pretrained(make(), str(tmp_path / "out")).eval()
    assert (logits(judge) - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = make()
    found = reparam.load(again, tmp_path / "out")
    assert found.tensors().keys() == adapter.tensors().keys()
    assert all(torch.equal(found.tensors()[key], value) for key, value in adapter.tensors().items())
    assert torch.equal(logits(again.eval()), expected)


def test_we_compute_what_peft_trained_and_pruned(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=3, total_step=8, lora_alpha=64, target_modules=["q_proj", "up_proj"]
    )
    judge = peft.get_peft_model(models.llama(), config)
    optimizer = torch.optim.AdamW([p for p in judge.parameters() if p.requires_grad], lr=3e-2)
    for t in range(8):
        ids = torch.randint(0, 90, (2, 6), generator=torch.Generator().manual_seed(t))
        judge(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        judge.base_model.update_and_allocate(t)
        optimizer.zero_grad()
    judge.save_pretrained(str(tmp_path / "out"))
    model = models.llama()
    adapter = reparam.load(model, tmp_path / "out")
    assert sum(ranks(adapter)) == 8
    expected = logits(judge.eval())
    assert (logits(model.eval()) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_peft_has_no_equal_of_is_refused(tmp_path: Path) -> None:
    _, adapter, _ = adapted(magnitude=True)
    with pytest.raises(reparam.FormatError, match="DoRA's magnitudes"):
        adapter.requires_grad_(False).save(tmp_path / "a", format="peft")
    adapter = reparam.attach(models.llama(), AdaLoRA(**SHORT), targets=["embed_tokens"])
    with pytest.raises(reparam.FormatError, match=r"the embedding model\.embed_tokens"):
        adapter.requires_grad_(False).save(tmp_path / "a", format="peft")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["rank_pattern"].update({next(iter(c["rank_pattern"])): [True]}), "its rank_pattern keeps 1 of 1"),
        (lambda c: c.update(use_dora=True), "use_dora: PEFT's AdaLoRA has no magnitudes"),
        (lambda c: c.update(target_r=9), "target_r=9 is above init_r=4"),
        (lambda c: c.update(beta1=2.0), "beta1=2.0: expected a number between 0 and 1"),
        (lambda c: c.update(surprise=1), "surprise = 1: unknown"),
    ],
)
def test_damaged_files_of_peft_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    _, adapter = shrunk()
    adapter.save(tmp_path / "out", format="peft")
    file = tmp_path / "out" / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    with pytest.raises(reparam.FormatError, match=message):
        reparam.load(models.llama(), tmp_path / "out")


# ---- the command line


def test_reparam_train_gives_the_length_and_an_interrupted_run_is_the_same(tmp_path: Path) -> None:
    """Resumed in the middle of the fall, and after the ranks are final."""
    models.save_base(tmp_path / "base")
    lines = (Path(__file__).parents[2] / "assets/tasks/signatures/train.jsonl").read_text().splitlines()[:40]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    common = {
        "base.path": str(tmp_path / "base"),
        "data.train": str(tmp_path / "rows.jsonl"),
        "data.score_rows": 1,
        "method.name": "adalora",
        "method.init_r": 4,
        "method.target_r": 2,
        "optim.learning_rate": 0.03,
        "run.max_steps": 8,
        "run.batch_size": 2,
        "run.save_every": 1,
        "run.keep": 8,
    }

    def go(output: str) -> tuple[dict[str, Tensor], str]:
        text = io.StringIO()
        train(resolve(None, {**common, "run.output": str(tmp_path / output)}), show=Show(Console(file=text, width=200)))
        return load_file(tmp_path / output / "adapter" / "adapter.safetensors"), text.getvalue()

    whole, _ = go("whole")
    assert sum(len(value) for key, value in whole.items() if key.endswith(".E")) == 28
    for stop in (3, 6):
        cut = tmp_path / f"cut{stop}"
        cut.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", cut / f"checkpoint-{stop}")
        found, text = go(cut.name)
        assert f"continuing from {cut}/checkpoint-{stop}" in text
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole)
    short = {**common, "run.max_steps": 5, "method.tinit": 2, "method.tfinal": 3, "run.output": str(tmp_path / "short")}
    with pytest.raises(ValueError, match="5 steps are too few for tinit=2 and tfinal=3"):
        train(resolve(None, short), show=Show(Console(quiet=True)))
