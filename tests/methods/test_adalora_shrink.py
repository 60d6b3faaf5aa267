"""AdaLoRA: ranks that shrink during training, in any loop, and resumed runs."""

import copy
import io
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from adalora_cases import OPTIMIZERS, SHORT, adapted, living, ranks, step, svd
from models import IDS, logits
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import reparam
from reparam import AdaLoRA
from reparam.adapter.load import fill
from reparam.io import files
from reparam.methods.adalora.budget import Budget, Schedule
from reparam.optim import lora_plus
from reparam.train.config import resolve
from reparam.train.run import train
from reparam.train.show import Show

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
    plan = Schedule(10, 2, 3, 1)
    assert sizes == [56] * 4 + [plan.budget(4, 56, 28)] * 3 + [28] * 3
    assert budget.quantized


def test_states_that_cannot_follow_stay_and_are_masked_until_the_end() -> None:
    model, adapter, budget = adapted()
    optimizer = torch.optim.Adafactor(adapter.parameters(), lr=1e-2)  # keeps rows and columns of its mean squares
    adapter.bind(optimizer)
    for t in range(10):
        step(model, optimizer, seed=t)
        if t >= 7:
            assert living(adapter) == 28
    assert sum(ranks(adapter)) == 56
    assert not budget.quantized
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
    with pytest.raises(ValueError, match="saved budget is for other sites"):
        other.load_state_dict(budget.state_dict())
    higher = reparam.attach(models.llama(), AdaLoRA(**{**SHORT, "init_r": 5})).controller
    assert higher is not None
    with pytest.raises(ValueError, match="mean of the saved budget have other ranks"):
        higher.load_state_dict(budget.state_dict())


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
        shutil.copy(tmp_path / "whole" / "run.json", cut)
        found, text = go(cut.name)
        assert f"resuming from {cut}/checkpoint-{stop}" in text
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole)
    short = {**common, "run.max_steps": 5, "method.tinit": 2, "method.tfinal": 3, "run.output": str(tmp_path / "short")}
    with pytest.raises(ValueError, match="5 steps are too few for tinit=2 and tfinal=3"):
        train(resolve(None, short), show=Show(Console(quiet=True)))
