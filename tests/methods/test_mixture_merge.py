"""Merging of mixtures, and their files."""

from typing import Any

import models
import pytest
import torch
from cases import error, move
from mixtures import BY_TASK, LOOKING, adapted, presets, run
from models import logits

import reparam
from reparam.errors import InputDependentError
from reparam.methods.mixture import Mixture

# ---- merging


@pytest.mark.parametrize("name", BY_TASK)
def test_a_task_is_merged_and_the_base_comes_back(name: str) -> None:
    model, _ = adapted(name)
    y = {task: run(model, name, task=task) for task in ("a", "b", "c")}
    base = logits(models.llama())
    for task in ("b", "c"):
        with reparam.context(model, tasks=task):
            report = reparam.merge(model, keep_base=True)
        assert error(logits(model), y[task]) < 1e-5
        assert min(error(logits(model), y[other]) for other in y if other != task) > 1e-3
        report.restore()
        assert torch.equal(run(model, name, task=task), y[task])
    with reparam.select(model, None):
        assert torch.equal(logits(model), base)
    with pytest.raises(InputDependentError, match=r"router .task_.*no task was given"):
        reparam.merge(model)
    with (
        reparam.context(model, tasks=["a", "b", "c"]),
        pytest.raises(InputDependentError, match="several tasks were given"),
    ):
        reparam.merge(model)


@pytest.mark.parametrize("name", LOOKING)
def test_what_looks_at_its_input_is_not_merged(name: str) -> None:
    model, adapter = adapted(name)
    y = run(model, name)
    with pytest.raises(InputDependentError, match=f"router '{adapter.method.router}'"):
        reparam.merge(model)
    assert torch.equal(run(model, name), y)


def test_a_static_mixture_is_merged() -> None:
    model = models.llama()
    move(reparam.attach(model, Mixture(n=3, r=2, router="static", scope="layer")), 1, size=0.3)
    y = logits(model)
    reparam.merge(model)
    assert error(logits(model), y) < 1e-5


@pytest.mark.parametrize("name", [n for n in LOOKING if n != "mov"])
def test_gates_that_are_constant_make_a_merged_lora(name: str) -> None:
    """Routers of zeros give equal weights."""
    model, adapter = adapted(name, select="softmax", k=1, gate="prob", losses={})
    with torch.no_grad():
        for key, parameter, _ in adapter.named_parameters():
            if "router" in key:
                parameter.zero_()
    other = models.llama()
    with torch.no_grad():
        for path, update in adapter.updates.items():
            n = adapter.method.n
            if not hasattr(update, "ranks"):
                change = update.factors(None).B @ update.A
            elif name == "hydralora":
                change = update.scale / n * update.B.view(len(update.B), n, -1).sum(1) @ update.A
            else:
                change = update.scale / n * update.B @ update.A
            other.get_submodule(path).weight.add_(change)
    assert error(run(model, name), logits(other)) < 1e-5


# ---- files


@presets
def test_files_keep_everything_and_shared_routers_once(name: str, tmp_path: Any) -> None:
    model, adapter = adapted(name)
    adapter.save(tmp_path / "a")
    other = models.llama()
    again = reparam.load(other, tmp_path / "a")
    assert torch.equal(run(model, name), run(other, name))
    assert again.method == adapter.method
    keys = [key for key in adapter.tensors() if "router" in key]
    scopes = {"task_gated": 1, "mole": 2, "llava_mole": 2, "xlora": 1}.get(name)
    if scopes is not None:
        assert len({key.rpartition(".")[0] for key in keys}) == scopes
        assert all(key.startswith("reparam_shared.routers.") for key in keys)
    else:
        assert len({key.rpartition(".")[0] for key in keys}) == len(adapter.sites)
