"""DoRA: cached norms, and the changes that invalidate them."""

import copy
from typing import Any

import models
import pytest
import torch
from dora_cases import axes, factors_of, layer, random, update_of
from models import logits
from torch import Tensor

import reparam
from reparam.core.registry import STORAGES
from reparam.sites.linear import Linear
from reparam.weights.dense import DenseWeight

# ---- what is kept, and when it is measured anew


def measured(adapted: Linear) -> Tensor:
    """The output for a fixed input, with the cached norms."""
    with torch.no_grad():
        return adapted(random(3, adapted.frozen.in_features, dtype=adapted.frozen.dtype))


def anew(adapted: Linear) -> Tensor:
    """The same from a copy without cached norms."""
    twin = copy.deepcopy(adapted)
    update_of(twin).forget()
    twin.weight.__dict__.pop("_squared_norms", None)
    return measured(twin)


def sgd(adapted: Linear, optimizer: Any, **settings: Any) -> None:
    stepper = optimizer(list(update_of(adapted).parameters()), lr=0.3, **settings)
    update_of(adapted).requires_grad_()
    adapted(random(3, 40, dtype=torch.float32)).square().sum().backward()
    stepper.step()


def write_base(adapted: Linear) -> None:
    w = adapted.frozen.dense_or_none
    assert w is not None
    w.mul_(torch.linspace(1, 2, w.shape[1]))


CHANGES: dict[str, Any] = {
    "A in place": lambda a: factors_of(a)[0].mul_(2),
    "B in place": lambda a: factors_of(a)[1].mul_(2),
    "magnitude in place": lambda a: update_of(a).magnitude.mul_(2),
    "W in place": write_base,
    "W in another storage": lambda a: a.hold(STORAGES["int8"]().quantize(a.frozen.tensor())),
    "W exchanged": lambda a: a.hold(DenseWeight(a.frozen.tensor() * torch.linspace(1, 2, 40))),
    "state dict": lambda a: a.load_state_dict({k: 2 * v + 0.1 for k, v in a.state_dict().items()}),
    "state dict, assigned": lambda a: a.load_state_dict(
        {k: 2 * v + 0.1 for k, v in a.state_dict().items()}, assign=True
    ),
    "through 16 bits": lambda a: a.bfloat16().float(),
    "SGD": lambda a: sgd(a, torch.optim.SGD),
    "AdamW": lambda a: sgd(a, torch.optim.AdamW, foreach=True),
    "fused AdamW": lambda a: sgd(a, torch.optim.AdamW, fused=True),
    "paged AdamW": lambda a: sgd(a, reparam.optim.PagedAdamW),
}


@pytest.mark.parametrize("change", CHANGES)
@axes
def test_a_change_is_seen(axis: str, change: str) -> None:
    adapted = layer(random(30, 40, dtype=torch.float32), norm_axis=axis)
    before = measured(adapted)
    assert torch.equal(measured(adapted), before)
    with torch.set_grad_enabled("step" in change or "SGD" in change or "AdamW" in change):
        CHANGES[change](adapted)
    after = measured(adapted)
    assert (after - before).abs().max() > 1e-4
    assert torch.equal(after, anew(adapted))


def test_nothing_is_measured_twice_without_a_change() -> None:
    """During gradient accumulation, in eval mode, and if a trainer calls `train()` before each batch."""
    adapted = layer(random(6, 5)).train()
    update, x = update_of(adapted), random(3, 5)
    adapted(x).sum().backward()
    kept = update._kept
    assert kept is not None
    adapted.train()
    adapted(x).sum().backward()
    assert update._kept is kept
    adapted.eval()
    adapted(x)
    other = update._kept
    with torch.no_grad():
        adapted(2 * x)
        with torch.inference_mode():
            adapted(x)
    assert update._kept is other


def test_what_inference_mode_measured_can_be_trained_on() -> None:
    adapted = layer(random(6, 5))
    with torch.inference_mode():
        adapted(random(3, 5))
    adapted(random(3, 5)).sum().backward()
    assert update_of(adapted).magnitude.grad is not None


def test_an_optimizer_that_writes_past_the_version_counters_is_noticed() -> None:
    """As fused optimizers and kernels of other libraries do."""
    adapted = layer(random(6, 5, dtype=torch.float32))

    class Raw(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data += 0.3

    optimizer = Raw(update_of(adapted).parameters(), lr=0.1)
    before = measured(adapted)
    optimizer.step()
    assert not torch.equal(measured(adapted), before)
    assert torch.equal(measured(adapted), anew(adapted))


def test_selecting_back_and_forth_and_two_adapters_on_one_site() -> None:
    model = models.llama()
    for name, seed in (("a", 1), ("b", 2)):
        adapter = reparam.attach(model, reparam.DoRA(r=2), name=name)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for p in adapter.parameters():
                p += 0.2 * torch.randn_like(p)
    found = {}
    for name in ("a", "b", None, "a", "b"):
        reparam.select(model, name)
        y = logits(model)
        assert torch.equal(found.setdefault(name, y), y)
    assert not torch.equal(found["a"], found["b"])


@axes
def test_pickled_and_copied_modules_keep_working(axis: str) -> None:
    adapted = layer(random(6, 5), norm_axis=axis)
    y = measured(adapted)
    twin = copy.deepcopy(adapted)
    assert torch.equal(measured(twin), y)
    with torch.no_grad():
        factors_of(twin)[1].mul_(2)
    assert torch.equal(measured(twin), anew(twin))
    assert torch.equal(measured(adapted), y)


@axes
@pytest.mark.parametrize("settings", [{}, {"gradient": "exact"}, {"magnitude_only": True}], ids=str)
def test_compiled_without_graph_breaks_in_eval_and_training(axis: str, settings: dict[str, Any]) -> None:
    torch.compiler.reset()
    adapted = layer(random(6, 5, dtype=torch.float32), norm_axis=axis, **settings)
    x = random(3, 5, dtype=torch.float32)
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), adapted(x), rtol=1e-5, atol=1e-6)
        for p in update_of(adapted).parameters():
            p.mul_(1.5)
        write_base(adapted)
        torch.testing.assert_close(compiled(x), adapted(x), rtol=1e-5, atol=1e-6)
    wanted = list(update_of(adapted).parameters())
    one, two = (torch.autograd.grad(run(x).square().sum(), wanted) for run in (adapted, compiled))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_a_compiled_graph_stops_where_it_would_have_to_measure_directly() -> None:
    torch.compiler.reset()
    u, v = random(6, 1, dtype=torch.float32), random(1, 5, seed=2, dtype=torch.float32)
    adapted = layer(u @ v, r=1, alpha=1.0)
    with torch.no_grad():
        factors_of(adapted)[0].copy_(v)
        factors_of(adapted)[1].copy_(-(1 - 1e-4) * u)
        assert adapted(random(3, 5, dtype=torch.float32)).isfinite().all()
        with pytest.raises(RuntimeError, match="an update nearly cancels a row of W"):
            torch.compile(adapted, fullgraph=True, backend="aot_eager")(random(3, 5, dtype=torch.float32))
    torch.compiler.reset()
