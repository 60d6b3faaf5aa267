"""Attaching an adapter to a model, and the returned `Adapter`."""

import copy
import math
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import logits
from torch import nn

import reparam
from reparam.core.base import Site, Update, Weight
from reparam.core.method import Method
from reparam.sites.embedding import Embedding
from reparam.sites.linear import Linear

# ---- attaching


class Fails(Method):
    """A method whose last site cannot be built."""

    name = "fails"

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        if "layers.1.mlp.down" in site.name or "h.1.mlp.c_proj" in site.name:
            raise ValueError("not here")
        return reparam.LoRA(r=2).build(site, weight, shared)


@pytest.mark.parametrize("make", [models.llama, models.gpt2])
def test_a_method_that_fails_leaves_the_model_untouched(make: Any) -> None:
    model = make()
    before, state, names = str(model), models.frozen(model), [n for n, _ in model.named_parameters()]
    y = logits(model)
    with pytest.raises(ValueError, match="not here"):
        reparam.attach(model, Fails())
    assert str(model) == before
    assert [n for n, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())
    assert models.same(models.frozen(model), state)
    assert torch.equal(logits(model), y)
    assert reparam.adapters(model) == {}


def test_attaching_freezes_everything_else() -> None:
    model = models.llama()
    one = reparam.attach(model, reparam.LoRA(r=2), name="one", bias=True, modules_to_save=["lm_head", "norm"])
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trains) == len(one.parameters()) == 2 * 14 + 2
    assert {id(p) for p in one.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    two = reparam.attach(model, reparam.LoRA(r=2), name="two")
    assert {id(p) for p in two.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    one.requires_grad_()
    two.requires_grad_(False)
    assert {id(p) for p in one.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_module_that_is_trained_whole_gets_no_update_besides() -> None:
    model = models.llama()
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["q_proj", "lm_head"], modules_to_save=["lm_head"])
    assert set(adapter.replaced) == {"lm_head"}
    assert set(adapter.sites) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    base = logits(models.llama())
    with torch.no_grad():
        adapter.replaced["lm_head"].updates["default"].weight.mul_(2)  # type: ignore[operator,union-attr]
        assert torch.allclose(logits(model), 2 * base, atol=1e-5)
        with reparam.select(model, None):
            assert torch.equal(logits(model), base)


def test_what_one_adapter_adapts_no_other_trains_whole_and_the_other_way_round() -> None:
    model = models.llama()
    reparam.attach(model, reparam.LoRA(r=2), targets=["up_proj"], name="a")
    for whole, why in {
        "up_proj": "an adapter already changes .*up_proj",
        "layers.1.mlp": "an adapter already changes .*up_proj",
        "self_attn": "LlamaAttention takes more than one input",
        "layers": "ModuleList does not define forward",
    }.items():
        with pytest.raises(ValueError, match=rf"cannot be trained whole.*{why}"):
            reparam.attach(model, reparam.LoRA(r=2), targets=["v_proj"], modules_to_save=[whole], name="b")
    reparam.attach(model, reparam.LoRA(r=2), targets=["v_proj"], modules_to_save=["lm_head"], name="b")
    with pytest.raises(ValueError, match=r"lm_head: b trains a full copy of this module"):
        reparam.attach(model, reparam.LoRA(r=2), targets=["lm_head"], name="c")
    assert reparam.adapters(model).keys() == {"a", "b"}


# ---- the handle


def test_the_handle_knows_names_parameters_and_roles() -> None:
    model = models.gpt2()
    adapter = reparam.attach(
        model, reparam.LoRA(r=2), targets=["c_fc"], name="task", bias=True, modules_to_save=["lm_head"]
    )
    found = {name: role for name, _, role in adapter.named_parameters()}
    site = "transformer.h.0.mlp.c_fc"
    assert found[f"{site}.A"] == "in"
    assert found[f"{site}.B"] == "out"
    assert found[f"{site}.bias"] is None
    assert found["lm_head.weight"] is None
    assert len(found) == 2 * 3 + 1
    count = 2 * (2 * (32 + 128) + 128) + 97 * 32
    assert repr(adapter) == f"Adapter('task', lora, 2 sites, {count:,} parameters)"
    assert set(adapter.tensors()) == set(found)
    assert reparam.adapters(model)["task"] is adapter


def test_an_optimizer_that_would_train_less_is_refused() -> None:
    adapter = reparam.attach(models.llama(), reparam.LoRA(r=2), name="task")
    with pytest.raises(ValueError, match=r"adapter 'task': 27 parameters are not in the optimizer \(first: model"):
        adapter.bind(torch.optim.SGD(adapter.parameters()[:1], lr=1))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1)
    assert adapter.bind(optimizer) is adapter
    adapter.parameters()[3].requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 parameter is frozen .*layers\.0\.self_attn\.k_proj\.B"):
        adapter.bind(optimizer)


class Counted(Method):
    """LoRA that records the controller's calls around optimizer steps."""

    name = "counted"

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        return reparam.LoRA(r=2).build(site, weight, shared)

    def controller(self, updates: Any) -> Any:
        return Events()


class Events(list[str]):
    """Records the controller's calls, in order."""

    def plan(self, total_steps: int | None) -> None:
        self.total_steps = total_steps

    def before_step(self) -> None:
        self.append("before")

    def after_step(self, optimizer: Any) -> None:
        self.append("after")


def test_a_controller_is_called_once_around_each_step_of_the_bound_optimizer() -> None:
    model = models.llama()
    adapter = reparam.attach(model, Counted())
    first, second = (torch.optim.SGD(adapter.parameters(), lr=0.1) for _ in range(2))
    adapter.bind(first)
    first.step()
    assert adapter.controller == ["before", "after"]
    adapter.bind(first).bind(second)
    first.step()
    assert adapter.controller == ["before", "after"]
    second.step()
    second.step()
    assert adapter.controller == ["before", "after"] * 3
    twin = reparam.adapters(copy.deepcopy(model))["default"]
    second.step()
    assert len(twin.controller) == 6  # type: ignore[arg-type]
    assert len(adapter.controller) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_saved(value: float, tmp_path: Path) -> None:
    adapter = reparam.attach(models.llama(), reparam.LoRA(r=2), name="task")
    with torch.no_grad():
        adapter.parameters()[5][0, 0] = value
    with pytest.raises(ValueError, match=r"adapter 'task': NaN or infinity in model\.layers\.0\.self_attn\.v_proj\.B"):
        adapter.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_file_holds_the_adapter_and_nothing_of_the_base(tmp_path: Path) -> None:
    adapter = reparam.attach(models.llama(), reparam.LoRA(r=2))
    adapter.save(tmp_path / "a")
    size = (tmp_path / "a/adapter.safetensors").stat().st_size
    payload = 4 * sum(p.numel() for p in adapter.parameters())
    assert payload <= size < payload + 4096


# ---- layers


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Embedding(4, 3)], ids=["linear", "embedding"])
def test_a_wrapped_layer_computes_what_it_did_and_comes_back(layer: nn.Module) -> None:
    layer.weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    x = torch.tensor([[0, 3]]) if isinstance(layer, nn.Embedding) else torch.randn(2, 3)
    y = layer(x)
    wrapped = (Embedding if isinstance(layer, nn.Embedding) else Linear).wrap(layer)
    assert torch.equal(wrapped(x), y)
    assert wrapped.site("here").kind == wrapped.kind
    assert wrapped.restore() is layer
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("method", [reparam.LoRA, 5, None])
def test_something_else_than_a_method_is_refused(method: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a configuration such as \w+\(\) or a name such as 'lora'"):
        reparam.attach(nn.Sequential(nn.Linear(4, 4)), method)
