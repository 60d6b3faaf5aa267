"""Mixtures whose experts are finished adapters, and splitting mixtures into adapters."""

import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from cases import error, move
from mixtures import run
from models import IDS, logits
from peft import LoraConfig, PeftModel, get_peft_model

import reparam
from reparam.core.registry import METHODS
from reparam.errors import FormatError, InputDependentError

TARGETS = ["q_proj", "v_proj", "down_proj"]
RANKS = {"sums": 2, "dates": 3, "names": 1}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, ...]:
    """Folders of adapters with different ranks and scales, one of them in PEFT's format."""
    found = []
    for seed, (name, rank) in enumerate(RANKS.items()):
        model = models.llama()
        adapter = reparam.attach(model, reparam.LoRA(r=rank, alpha=3.0 * rank + seed), targets=TARGETS)
        move(adapter, seed, size=0.1)
        adapter.save(tmp_path / name, format="peft" if name == "dates" else "reparam")
        found.append(str(tmp_path / name))
    return tuple(found)


def mole(folders: tuple[str, ...], **changes: Any) -> Any:
    model = models.llama()
    settings = {"experts": folders, "pool": "all", "losses": {}, **changes}
    return model, reparam.attach(model, METHODS["mole"](**settings))


def test_gates_over_finished_adapters_train_alone_and_stand_alone(folders: tuple[str, ...], tmp_path: Path) -> None:
    model, adapter = mole(folders)
    assert {name for name, _, _ in adapter.named_parameters()} == {
        f"reparam_shared.routers.model/layers/{i}.weight" for i in range(2)
    }
    assert adapter.method.experts == tuple(RANKS)
    assert len(adapter.sites) == 6
    before = {key: t.clone() for key, t in adapter.tensors().items()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    adapter.bind(optimizer)
    model.train()
    losses = []
    for _ in range(5):
        loss = models.loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    moved = {key for key, t in adapter.tensors().items() if not torch.equal(t, before[key])}
    assert moved == {name for name, _, _ in adapter.named_parameters()}
    model.eval()
    adapter.save(tmp_path / "mixed")
    for folder in folders:  # no longer needed
        for file in Path(folder).iterdir():
            file.unlink()
    other = models.llama()
    again = reparam.load(other, tmp_path / "mixed")
    assert torch.equal(logits(other), logits(model))
    assert again.method == adapter.method
    again.requires_grad_()
    assert len(again.parameters()) == 2


def test_runs_are_experts_by_their_adapters(folders: tuple[str, ...], tmp_path: Path) -> None:
    """A run's output folder holds its adapter in a subfolder; a list may name both kinds of folder."""
    for run_name, folder in (("first", folders[0]), ("last", folders[2])):
        shutil.copytree(folder, tmp_path / run_name / "adapter")
        (tmp_path / run_name / "figures.json").write_text("{}")
    named = (str(tmp_path / "first"), folders[1], str(tmp_path / "last/adapter"))
    plain, expected = mole(folders)
    model, adapter = mole(named)
    assert adapter.method.experts == ("first", "dates", "last")
    tensors = adapter.tensors()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.tensors().items())
    assert torch.equal(logits(model), logits(plain))
    with pytest.raises(FormatError, match="are the same adapter; name it once"):
        mole((str(tmp_path / "first"), str(tmp_path / "first/adapter")))


def test_each_expert_alone_is_the_adapter_it_was(folders: tuple[str, ...]) -> None:
    model, _ = mole(folders)
    for number, folder in enumerate(folders):
        alone = models.llama()
        reparam.load(alone, folder)
        with reparam.context(model, experts=[number]):
            assert error(logits(model), logits(alone)) < 1e-5


def test_a_static_mixture_of_finished_adapters_merges_to_their_weighted_sum(folders: tuple[str, ...]) -> None:
    model, adapter = mole(folders, router="static", scope="model")
    with torch.no_grad():
        adapter.shared.routers["model"].logits.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    expected = models.llama()
    for folder, weight in zip(folders, (0.2, 0.3, 0.5), strict=True):
        alone = models.llama()
        one = reparam.load(alone, folder)
        for path, module in one.modules.items():
            factors = module.updates["default"].factors(module.frozen)
            with torch.no_grad():
                expected.get_submodule(path).weight.add_(factors.B @ factors.A, alpha=weight)
    y = logits(model)
    assert error(y, logits(expected)) < 1e-5
    reparam.merge(model)
    assert error(logits(model), y) < 1e-5


def test_what_cannot_be_an_expert_is_refused(folders: tuple[str, ...], tmp_path: Path) -> None:
    def saved(name: str, method: Any, model: Any = None, **settings: Any) -> str:
        model = models.llama() if model is None else model
        adapter = reparam.attach(model, method, **{"targets": TARGETS, **settings})
        move(adapter, 1)
        adapter.save(tmp_path / name)
        return str(tmp_path / name)

    other = models.llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(2)
    lora = reparam.LoRA(r=2)
    cases = {
        str(tmp_path / "none"): "no such folder",
        saved("dora", reparam.DoRA(r=2)): "changes .* by more than a low-rank matrix",
        saved("elsewhere", lora, targets=["q_proj"]): "adapt different modules",
        saved("head", lora, modules_to_save=["lm_head"]): "also trains lm_head, and the experts of a mixture",
        saved("other", lora, other): "trained on a base with different weights",
        saved("routed", METHODS["molora"](n=2, r=2)): "cannot be an expert: .*router 'token'",
    }
    for folder, message in cases.items():
        model = models.llama()
        with pytest.raises(FormatError, match=message):
            reparam.attach(model, METHODS["mole"](experts=(*folders, folder)))
        assert torch.equal(logits(model), logits(models.llama()))
    with pytest.raises(FormatError, match="which the targets leave out"):
        reparam.attach(models.llama(), METHODS["mole"](experts=folders), targets="attention")
    with pytest.raises(ValueError, match="set frozen=true"):
        METHODS["molora"](experts=folders)


# ---- a mixture as plain adapters


def by_task(**settings: Any) -> Any:
    model = models.llama()
    method = METHODS["task_gated"](**{"n": 4, "r": 8, "tasks": ("a", "b", "c d"), **settings})
    adapter = reparam.attach(model, method, name="tasks")
    move(adapter, 1, size=0.2)
    return model, adapter


@pytest.mark.parametrize("method", ["task_gated", "poly"])
def test_tasks_become_adapters_that_share_a_batch(method: str, tmp_path: Path) -> None:
    model = models.llama()
    adapter = reparam.attach(model, METHODS[method](n=2, r=4, tasks=("a", "b", "c d")), name="tasks")
    move(adapter, 1, size=0.3)
    expected = [run(model, "task_gated", task=task) for task in range(3)]
    found = reparam.split(model, "tasks")
    assert [a.name for a in found.values()] == ["tasks-a", "tasks-b", "tasks-c_d"]
    with torch.no_grad(), reparam.select(model, ["tasks-c_d", "tasks-a", None]):
        mixed = logits(model)
    assert error(mixed[0], expected[2][0]) < 1e-5
    assert error(mixed[1], expected[0][1]) < 1e-5
    assert torch.equal(run(model, "task_gated", task="b"), expected[1])  # the mixture stays, and stays selected

    found["b"].save(tmp_path / "b", format="peft")
    judge = PeftModel.from_pretrained(models.llama(), tmp_path / "b").eval()
    assert error(logits(judge), expected[1]) < 1e-5
    with pytest.raises(ValueError, match="'tasks-a' is taken"):
        reparam.split(model, "tasks")


def test_only_gates_by_task_are_taken_apart() -> None:
    model = models.llama()
    reparam.attach(model, METHODS["molora"](n=2), name="token")
    with pytest.raises(InputDependentError, match="router 'token'"):
        reparam.split(model, "token")
    reparam.attach(model, METHODS["mov"](n=2), name="vectors")
    reparam.attach(model, reparam.LoRA(), name="plain")
    for name in ("vectors", "plain"):
        with pytest.raises(ValueError, match="is not a mixture of low-rank experts"):
            reparam.split(model, name)
    with pytest.raises(ValueError, match="no adapter is named"):
        reparam.split(model, "plane")
    assert set(reparam.adapters(model)) == {"token", "vectors", "plain"}


def test_a_mixed_batch_takes_the_task_that_is_named() -> None:
    """One task at a time; the factors of a task are gone once its context ends."""
    model, _ = by_task()
    expected = {task: run(model, "task_gated", task=task) for task in ("a", "b")}
    for task in ("a", "b"):
        with torch.no_grad(), reparam.context(model, tasks=task), reparam.select(model, ["tasks", None, "tasks"]):
            assert error(logits(model)[2], expected[task][2]) < 1e-5
    with pytest.raises(InputDependentError, match="no task was given"):
        reparam.select(model, ["tasks", None, "tasks"])


def test_one_peft_adapter_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    """A mixture of a single adapter that PEFT wrote."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False)
    judge = get_peft_model(models.llama(), config).eval()
    judge.save_pretrained(tmp_path / "one")
    expected = logits(judge)
    model = models.llama()
    reparam.attach(model, METHODS["mole"](experts=(str(tmp_path / "one"),), pool="all"))
    assert error(run(model, "mole", IDS), expected) < 1e-5
    reparam.merge(model)
    assert error(logits(model), expected) < 1e-5
