"""LoRA+: groups by role as in PEFT, invariants of two learning rates, and schedules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from models import IDS, llama
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim import lr_scheduler
from toys import Nudge
from transformers import get_scheduler

import reparam
from reparam import LoRA
from reparam.core.base import Site
from reparam.core.method import Method
from reparam.core.registry import METHODS
from reparam.optim import PagedAdamW, check_rates, lora_plus

SITES = {"a": Site("a", "linear", 4, 8), "b": Site("b", "embedding", 9, 8)}


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def summary(groups: list[dict[str, Any]]) -> Counter[tuple[float, float, tuple[int, ...]]]:
    """Rates, weight decay and parameter sizes; PEFT transposes the factors of embeddings."""
    return Counter(
        (g["lr"], g["weight_decay"], tuple(sorted(p.numel() for p in g["params"]))) for g in groups if g["params"]
    )


# ---- the groups


def test_groups_are_those_of_peft() -> None:
    """Factors, biases, an adapted embedding, a matrix trained whole."""
    targets, whole = ["q_proj", "up_proj", "embed_tokens"], ["lm_head"]
    judge = peft.get_peft_model(
        llama(attention_bias=True),
        peft.LoraConfig(r=2, target_modules=targets, modules_to_save=whole, bias="lora_only"),
    )
    settings = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-5, "loraplus_weight_decay": 0.1}
    theirs = create_loraplus_optimizer(judge, torch.optim.AdamW, **settings).param_groups
    adapter = reparam.attach(llama(attention_bias=True), LoRA(r=2), targets=targets, modules_to_save=whole, bias=True)
    ours = lora_plus(
        adapter.named_parameters(), adapter.sites, lr=1e-3, ratio=16.0, embedding_lr=1e-5, weight_decay=0.1
    )
    assert summary(ours) == summary(theirs)
    assert [group["name"] for group in ours] == ["in", "embedding", "out", "out, no decay"]


def test_groups_part_what_trains() -> None:
    adapter = reparam.attach(llama(), LoRA(r=2), targets="all-linear", modules_to_save=["norm"])
    groups = lora_plus(adapter.named_parameters(), adapter.sites, lr=1e-3)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in adapter.parameters())
    for kind in (torch.optim.AdamW, torch.optim.SGD, PagedAdamW):
        adapter.bind(kind(groups, lr=1e-3))


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(cls(**settings), id=f"{name}{index}")
        for name, cls in {**METHODS, "nudge": Nudge}.items()
        for index, settings in enumerate(cls.examples)
    ],
)
def test_every_method_has_its_groups_or_is_refused(method: Method) -> None:
    adapter = reparam.attach(llama(), method, targets="all-linear")
    if not any(role == "out" for _, _, role in adapter.named_parameters()):
        with pytest.raises(ValueError, match="none has the role 'out'"):
            lora_plus(adapter.named_parameters(), adapter.sites, lr=1e-3)
        return
    groups = lora_plus(adapter.named_parameters(), adapter.sites, lr=1e-3, ratio=4.0)
    held = {id(p): group for group in groups for p in group["params"]}
    assert len(held) == len(adapter.parameters())
    for _, p, role in adapter.named_parameters():
        assert held[id(p)]["lr"] == (4e-3 if role in ("out", "gain") else 1e-3)
    adapter.bind(torch.optim.AdamW(groups))


def test_roles_and_not_names_say_the_rate() -> None:
    """AdaLoRA's λ has A's rate; DoRA's gain has B's rate, or A's on request; routers have A's."""
    named = {
        "a.lora_B": (parameter(2, 8), "in"),
        "a.experts.0.out": (parameter(4, 2), "out"),
        "a.values": (parameter(2), "core"),
        "a.router": (parameter(3), "route"),
        "a.m": (parameter(4), "gain"),
        "a.bias": (parameter(4), None),
        "head.weight": (parameter(4, 4), None),
        "b.A": (parameter(2, 8), "in"),
        "b.B": (parameter(9, 2), "out"),
    }
    parameters = [(name, p, role) for name, (p, role) in named.items()]
    names = {id(p): name for name, p, _ in parameters}

    def found(**settings: Any) -> dict[str, list[str]]:
        groups = lora_plus(parameters, SITES, lr=1.0, weight_decay=0.5, **settings)  # type: ignore[arg-type]
        assert [g["weight_decay"] for g in groups] == [0.0 if "no decay" in g["name"] else 0.5 for g in groups]
        return {g["name"]: [names[id(p)] for p in g["params"]] for g in groups}

    slow = ["a.lora_B", "a.values", "a.router", "head.weight"]
    embedding = {"embedding": ["b.A", "b.B"]}
    upstream = {"in": slow, **embedding, "out": ["a.experts.0.out", "a.m"], "out, no decay": ["a.bias"]}
    assert found() == upstream
    slow = ["a.lora_B", "a.values", "a.router", "a.m", "head.weight"]
    assert found(vectors="in") == {
        "in": slow, "in, no decay": ["a.bias"], **embedding, "out": ["a.experts.0.out"]
    }  # fmt: skip
    assert found(no_decay=[named["b.A"][0]])["embedding, no decay"] == ["b.A"]


def test_the_rate_of_embeddings_depends_on_nothing() -> None:
    parameters: Any = [("a.B", parameter(4, 2), "out"), ("b.B", parameter(9, 2), "out")]
    for lr, ratio in ((1e-3, 16.0), (1e-2, 4.0)):
        rates = {g["name"]: g["lr"] for g in lora_plus(parameters, SITES, lr=lr, ratio=ratio)}
        assert rates == {"out": lr * ratio, "embedding": 1e-6}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "ratio=0.0: expected a finite number above 0"),
        ({"ratio": -16.0}, "ratio=-16.0: expected a finite number above 0"),
        ({"ratio": math.nan}, "ratio=nan: expected a finite number above 0"),
        ({"ratio": None}, "ratio=None: expected a finite number above 0"),
        ({"lr": 0.0}, r"lr=0.0: expected a finite number above 0"),
        ({"embedding_lr": -1e-6, "lr": math.inf}, "lr=inf: .*; embedding_lr=-1e-06: expected a finite number of at"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: expected a finite number of at least 0"),
        ({"vectors": "B"}, "vectors='B': expected 'out' or 'in'"),
    ],
    ids=str,
)
def test_bad_numbers_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LoRA\\+: {message}"):
        lora_plus([("a.B", parameter(4, 2), "out")], SITES, **{"lr": 1e-3, **settings})


def test_nothing_to_give_the_ratio_to_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of 2 parameters none has the role 'out' .*\(roles: core, none\)"):
        lora_plus([("a.v", parameter(4), "core"), ("a.bias", parameter(4), None)], SITES, lr=1e-3)
    with pytest.raises(ValueError, match="none has the role 'out' at a linear map"):
        lora_plus([("b.B", parameter(9, 2), "out")], SITES, lr=1e-3)
    frozen = parameter(4, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 parameter is frozen \(first: a.B\); call adapter.requires_grad_"):
        lora_plus([("a.B", frozen, "out"), ("a.C", parameter(4, 2), "out")], SITES, lr=1e-3)  # type: ignore[list-item]


@pytest.mark.parametrize(("ratio", "message"), [(0.5, "the reverse of LoRA"), (200.0, "use at most 80")])
def test_unlikely_ratios_are_warned_of(ratio: float, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        lora_plus([("a.B", parameter(4, 2), "out")], SITES, lr=1e-3, ratio=ratio)


# ---- what follows from two rates


def steps(
    make: Callable[..., torch.optim.Optimizer], *, lr: float, ratio: float, alpha: float, divide: float, count: int = 4
) -> dict[str, Tensor]:
    """Factors after some steps in float64 from B = B₀ / divide, and B times `divide` again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 6).double(), torch.randn(7, 3).double()
    adapter = reparam.attach(model, LoRA(r=2, alpha=alpha, scaling="alpha"), targets="all-linear")
    for _, p, role in adapter.named_parameters():
        p.data = p.data.double()
        if role == "out":
            p.data = torch.randn(p.shape).double() / divide
    optimizer = make(lora_plus(adapter.named_parameters(), adapter.sites, lr=lr, ratio=ratio), lr=lr)
    for _ in range(count):
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        optimizer.step()
    return {name: p.detach() * (divide if role == "out" else 1) for name, p, role in adapter.named_parameters()}


def test_under_sgd_it_is_lora_in_other_units() -> None:
    """(η, λη) is a single η on B / √λ with the scale √λ s."""
    two = steps(torch.optim.SGD, lr=1e-2, ratio=9.0, alpha=0.5, divide=1.0)
    one = steps(torch.optim.SGD, lr=1e-2, ratio=1.0, alpha=1.5, divide=3.0)
    assert two.keys() == one.keys()
    for name in two:
        torch.testing.assert_close(two[name], one[name], rtol=1e-9, atol=1e-12)


def test_under_adam_it_is_lora_in_other_units() -> None:
    """(η, λη) is a single η on B / λ with the scale λ s, once eps is nothing."""

    def adam(groups: Any, *, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=lr, eps=0.0)

    two = steps(adam, lr=1e-2, ratio=9.0, alpha=0.5, divide=1.0)
    one = steps(adam, lr=1e-2, ratio=1.0, alpha=4.5, divide=9.0)
    for name in two:
        torch.testing.assert_close(two[name], one[name], rtol=1e-9, atol=1e-12)


def test_the_first_step_moves_b_alone_and_ratio_times_as_far() -> None:
    moved = {}
    for ratio in (1.0, 16.0):
        model = llama()
        adapter = reparam.attach(model, LoRA(r=2), targets=["q_proj", "down_proj"])
        before = {name: p.detach().clone() for name, p, _ in adapter.named_parameters()}
        optimizer = torch.optim.SGD(lora_plus(adapter.named_parameters(), adapter.sites, lr=0.1, ratio=ratio))
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        moved[ratio] = {name: (p.detach() - before[name], role) for name, p, role in adapter.named_parameters()}
    for name, (delta, role) in moved[16.0].items():
        assert torch.equal(delta, 16 * moved[1.0][name][0])
        assert delta.any() == (role == "out")


# ---- schedules


def optimizer_of_two() -> torch.optim.Optimizer:
    parameters: Any = [("a.A", parameter(2, 8), "in"), ("a.B", parameter(4, 2), "out"), ("b.B", parameter(9, 2), "out")]
    return torch.optim.SGD(lora_plus(parameters, SITES, lr=0.1), lr=0.1)


KEEPING: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    **{
        name: (lambda o, name=name: get_scheduler(name, o, num_warmup_steps=3, num_training_steps=20))
        for name in ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")
    },
    "cosine_with_min_lr": lambda o: get_scheduler(
        "cosine_with_min_lr", o, num_warmup_steps=3, num_training_steps=20, scheduler_specific_kwargs={"min_lr": 0.01}
    ),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "one cycle, a rate for each": lambda o: lr_scheduler.OneCycleLR(
        o, [g["lr"] for g in o.param_groups], total_steps=20, cycle_momentum=False
    ),
}
BREAKING: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one cycle, one rate": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "a lowest rate": lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.05),
}


@pytest.mark.parametrize("name", KEEPING)
def test_schedules_that_multiply_keep_the_ratio(name: str) -> None:
    optimizer = optimizer_of_two()
    schedule = KEEPING[name](optimizer)
    for _ in range(20):
        check_rates(optimizer.param_groups)
        optimizer.step()
        if schedule.last_epoch < 19:
            schedule.step()


@pytest.mark.parametrize("name", BREAKING)
def test_schedules_with_rates_of_their_own_are_seen(name: str) -> None:
    optimizer = optimizer_of_two()
    schedule = BREAKING[name](optimizer)
    optimizer.step()
    schedule.step()
    with pytest.raises(ValueError, match=r"LoRA\+: the learning rate of 'in' is .* use a schedule that multiplies"):
        check_rates(optimizer.param_groups)


def test_rates_may_be_tensors_and_other_groups_are_left_out() -> None:
    optimizer = optimizer_of_two()
    optimizer.add_param_group({"params": [parameter(3)], "lr": 7.0})
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"] * 0.3)
    check_rates(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"none of the optimizer's groups is from lora_plus"):
        check_rates(torch.optim.SGD([parameter(3)]).param_groups)
