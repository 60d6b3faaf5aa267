"""Refusals of mixtures: settings, missing experts, gates that were not computed."""

import dataclasses
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from mixtures import adapted
from models import IDS, logits

import reparam
from reparam.core.registry import METHODS
from reparam.methods.mixture import Mixture
from reparam.sites.module import Adapted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n=0: expected a whole number of at least 1"),
        ({"select": "top_k", "k": 5, "n": 4}, "k=5 is above n=4, the number of experts"),
        ({"select": "top_k", "k": 1, "gate": "renorm"}, "the constant 1, so the router would not train"),
        ({"k": 2}, "k and gate need select='top_k'"),
        ({"temperature": 0.0}, "temperature=0.0: expected a finite number above 0"),
        ({"split": True, "r": 6, "n": 4}, "r=6 cannot be split among n=4"),
        ({"tasks": ("a", "b")}, "router='token' does not depend on them"),
        ({"tasks": ()}, "expected one or more different names"),
        ({"losses": {"balance": 1.0}}, "unknown 'balance' .did you mean 'mole_balance'"),
        ({"losses": {"router_z": -1.0}}, "at least 0"),
        ({"kind": "vectors", "router_std": 0.0}, "keeps all vectors equal"),
        ({"kind": "vectors", "losses": {"contrastive": 0.1}}, "two or more low-rank experts"),
        ({"route_on": "activation"}, "needs kind='vectors', scope='module'"),
        ({"experts": ("a", "b")}, "set frozen=true"),
        ({"frozen": True, "experts": ("a", "a")}, "named twice"),
        ({"select": "sigmoid", "router": "static", "scope": "model"}, "samples at each module in training"),
        ({"router": "tokens"}, "expected one of static"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"combine": "factor", "kind": "shared_a"}, "does not support kind='shared_a'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(**settings)


def test_mole_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="name their folders in experts, or set frozen=false"):
        reparam.attach(models.llama(), METHODS["mole"]())


def test_a_scope_used_before_its_gates_are_there_is_an_error() -> None:
    model, adapter = adapted("llava_mole")
    mlp = model.model.layers[0].mlp
    with pytest.raises(RuntimeError, match=r"mlp.up_proj was used before model.layers.0.mlp.gate_proj"):
        mlp.up_proj(torch.zeros(1, 2, 32))
    logits(model)
    adapter.shared.before_forward(model, (IDS,), {})
    with pytest.raises(RuntimeError, match="was used before"):
        mlp.down_proj(torch.zeros(1, 2, 48))


def test_the_mlp_of_llava_mole_has_one_router_and_attention_plain_lora() -> None:
    _, adapter = adapted("llava_mole")
    assert set(adapter.shared.routers) == {"model/layers/0/mlp", "model/layers/1/mlp"}
    kinds = {path.split(".")[3]: type(update).__name__ for path, update in adapter.updates.items()}
    assert kinds == {"self_attn": "LoRAUpdate", "mlp": "MixtureUpdate"}
    assert dataclasses.asdict(adapter.method)["select"] == "top_k"


@pytest.mark.parametrize("router", ["sequence", "task_logits", "task_embedding", "static"])
def test_a_bias_of_a_router_that_has_none(router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New adapters with it are refused, before the model is changed; a saved one loads, with a warning."""
    settings: dict[str, Any] = {"n": 2, "r": 2, "router": router, "router_bias": True}
    settings |= {"tasks": ("a", "b")} if router.startswith("task") else {}
    model = models.llama()
    with pytest.raises(ValueError, match=rf"mixture: router_bias=true has no effect with router='{router}'"):
        reparam.attach(model, "mixture", **settings)
    assert not reparam.adapters(model)
    assert not any(isinstance(module, Adapted) for module in model.modules())
    reparam.attach(models.llama(), "mixture", **{**settings, "router_bias": False})
    with monkeypatch.context() as patch:  # as an earlier release
        patch.setattr(Mixture, "idle_settings", lambda self: [])
        reparam.attach(model, "mixture", **settings).save(tmp_path)
    with pytest.warns(UserWarning, match="router_bias=true has no effect"):
        adapter = reparam.load(models.llama(), tmp_path)
    assert adapter.method.settings()["router_bias"]
    settings.pop("tasks", None)
    reparam.attach(models.llama(), "mixture", **{**settings, "router": "token"})
