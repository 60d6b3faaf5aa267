"""The state of training in a checkpoint: optimizers, schedules, generators, and plain data, bit for bit."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reparam.errors import StateError
from reparam.train.state import load_state, random_state, restore_optimizer, save_state, set_random_state

# ---- the state of training


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3, dtype=dtype)
        self.b = nn.Linear(3, 1, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(nn.functional.dropout(self.a(x).relu(), 0.3)).square().sum()


OPTIMIZERS = {
    "AdamW": lambda net: torch.optim.AdamW(
        [{"params": net.a.parameters(), "lr": 1e-2, "betas": (0.8, 0.95)}, {"params": net.b.parameters()}], lr=3e-3
    ),
    "AdamW amsgrad": lambda net: torch.optim.AdamW(net.parameters(), amsgrad=True, lr=torch.tensor(1e-2)),
    "AdamW named": lambda net: torch.optim.AdamW(net.named_parameters()),
    "SGD momentum": lambda net: torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9, nesterov=True),
    "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=1e-2),
    "Adafactor": lambda net: torch.optim.Adafactor(net.parameters(), beta2_decay=-0.7),
    "Rprop": lambda net: torch.optim.Rprop(net.parameters()),
    "Muon": lambda net: torch.optim.Muon([net.a.weight, net.b.weight]),
}


def step(net: Net, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> torch.Tensor:
    optimizer.zero_grad()
    loss = net(torch.randn(5, 4, dtype=net.a.weight.dtype))
    loss.backward()
    optimizer.step()
    scheduler.step()
    return loss.detach()


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, rest], [2])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_bit_for_bit(tmp_path, make):
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net)
    scheduler = schedule(optimizer)
    for _ in range(3):
        step(net, optimizer, scheduler)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    save_state(tmp_path, optimizer=optimizer, scheduler=scheduler, progress={"seen": 3})
    straight = [step(net, optimizer, scheduler) for _ in range(3)]

    torch.manual_seed(1)
    again = Net()
    other = make(again)
    plan = schedule(other)
    again.load_state_dict(weights)
    state = load_state(tmp_path)
    restore_optimizer(other, state.optimizer)
    plan.load_state_dict(state.scheduler)
    set_random_state(state.rng[0])
    assert state.progress == {"seen": 3}
    resumed = [step(again, other, plan) for _ in range(3)]

    assert torch.equal(torch.stack(straight), torch.stack(resumed))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    groups = [({k: v for k, v in g.items() if k != "params"}) for o in (optimizer, other) for g in o.param_groups]
    assert groups[: len(groups) // 2] == groups[len(groups) // 2 :]
    assert [type(v) for g in groups[: len(groups) // 2] for v in g.values()] == [
        type(v) for g in groups[len(groups) // 2 :] for v in g.values()
    ]


def test_a_state_of_another_dtype_than_its_parameter_is_not_cast(tmp_path):
    # torch's load_state_dict casts it to the parameter's dtype.
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    third, quantized = torch.full((3,), 1 / 3), torch.tensor([1, 200, 255], dtype=torch.uint8)
    optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": third, "exp_avg_sq": quantized}
    scheduler = schedule(optimizer)
    save_state(tmp_path, optimizer=optimizer, scheduler=scheduler, progress={})
    fresh = torch.optim.AdamW([parameter])
    restore_optimizer(fresh, load_state(tmp_path).optimizer)
    assert fresh.state[parameter]["exp_avg"].dtype == torch.float32
    assert torch.equal(fresh.state[parameter]["exp_avg"], third)
    assert torch.equal(fresh.state[parameter]["exp_avg_sq"], quantized)


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    net = Net()
    optimizer = OPTIMIZERS["AdamW"](net)
    save_state(tmp_path, optimizer=optimizer, scheduler=schedule(optimizer), progress={})
    with pytest.raises(StateError, match="does not fit this optimizer"):
        restore_optimizer(torch.optim.AdamW(net.parameters()), load_state(tmp_path).optimizer)


def test_every_generator_goes_on(tmp_path):
    optimizer = torch.optim.SGD(Net().parameters())

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]

    draw()
    save_state(tmp_path, optimizer=optimizer, scheduler=schedule(optimizer), progress={})
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert draw() != expected
    set_random_state(load_state(tmp_path).rng[0])
    assert draw() == expected


def test_saving_draws_no_random_number(tmp_path):
    optimizer = torch.optim.SGD(Net().parameters())
    scheduler = schedule(optimizer)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    save_state(tmp_path, optimizer=optimizer, scheduler=scheduler, progress={})
    assert torch.equal(torch.rand(2), expected)


def test_the_loss_scaler_goes_on(tmp_path):
    optimizer = torch.optim.SGD(Net().parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    save_state(tmp_path, optimizer=optimizer, scheduler=schedule(optimizer), progress={}, scaler=scaler)
    assert load_state(tmp_path).scaler == scaler.state_dict()


@pytest.mark.parametrize(
    "missing", ["optimizer.json", "optimizer.safetensors", "scheduler.json", "rng.json", "rng.safetensors"]
)
def test_a_missing_file_is_refused_by_name(tmp_path, missing):
    net = Net()
    optimizer = OPTIMIZERS["AdamW"](net)
    scheduler = schedule(optimizer)
    step(net, optimizer, scheduler)
    save_state(tmp_path, optimizer=optimizer, scheduler=scheduler, progress={})
    (tmp_path / missing).unlink()
    with pytest.raises(StateError, match=rf"lacks {missing}: without it training cannot continue"):
        load_state(tmp_path)


def test_a_damaged_file_is_refused_by_name(tmp_path):
    optimizer = torch.optim.SGD(Net().parameters())
    save_state(tmp_path, optimizer=optimizer, scheduler=schedule(optimizer), progress={})
    os.truncate(tmp_path / "rng.safetensors", 100)
    with pytest.raises(StateError, match=r"rng\.safetensors cannot be read"):
        load_state(tmp_path)


class Holder:
    """An object with a state dict."""

    def __init__(self, state: dict) -> None:
        self.state = state

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state_dict: dict) -> None:
        self.state = state_dict


def round_trip(folder: Path, state: dict) -> dict:
    save_state(folder, optimizer=Holder(state), scheduler=Holder({}), progress={})
    return load_state(folder).optimizer


def test_types_come_back_as_they_were(tmp_path):
    tree = {
        "tuple": (0.9, (1, [2, ()])),
        "keys": {0: "a", "0": "b", (1, 2): "c", None: "d"},
        "floats": [1e-300, 0.1 + 0.2, float("inf"), -float("inf")],
        "big": 1 << 70,
        "$tensor": "not a tensor",
        "flags": [True, None, 1],
        "empty": [{}, [], ()],
    }
    back = round_trip(tmp_path, tree)
    assert back == tree
    assert repr(back) == repr(tree)


def test_tensors_come_back_as_they_were(tmp_path):
    base = torch.arange(6.0)
    shared = torch.ones(3, dtype=torch.bfloat16)
    tree = {
        "views": [base[:3], base[3:], base.view(2, 3).T, base],
        "shared": [shared, shared],
        "a": {"b": torch.tensor(1)},
        "a/b": torch.tensor(2),
        0: torch.tensor(True),
        "0": torch.empty(0),
    }
    back = round_trip(tmp_path, tree)
    for key in ("views", "shared"):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tree[key], back[key], strict=True))
    assert back["shared"][0] is back["shared"][1]
    assert (back["a"]["b"], back["a/b"]) == (1, 2)
    assert back[0].item() is True
    assert back["0"].shape == (0,)


@pytest.mark.parametrize("value", [object(), {1, 2}, np.float32(1)])
def test_what_cannot_be_saved_is_named(tmp_path, value):
    with pytest.raises(StateError, match=rf"optimizer state holds a {type(value).__name__} at x/1"):
        round_trip(tmp_path, {"x": [0, value]})
    assert not (tmp_path / "optimizer.json").exists()


def test_a_tensor_subclass_is_named(tmp_path):
    class Sharded(torch.Tensor):
        pass

    with pytest.raises(StateError, match="holds a Sharded at x: only plain tensors"):
        round_trip(tmp_path, {"x": torch.ones(2).as_subclass(Sharded)})


def test_random_state_is_plain_data():
    state = random_state()
    assert set(state) == {"python", "numpy", "torch", "cuda"}
    assert isinstance(state["numpy"]["state"]["key"], list)
