"""LoRA+: groups by role as PEFT's, the laws that follow from two rates, and whole runs with them."""

from __future__ import annotations

import io
import json
import math
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import IDS, llama, save_base
from peft.optimizers import create_loraplus_optimizer
from rich.console import Console
from safetensors.torch import load_file
from stopping import Stopping
from torch import Tensor, nn
from torch.optim import lr_scheduler
from toys import Nudge
from transformers import get_scheduler

import reparam
from reparam import LoRA
from reparam.cli import main
from reparam.core.base import Site
from reparam.core.method import Method
from reparam.core.registry import METHODS
from reparam.errors import ConfigError
from reparam.optim import PagedAdamW, check_rates, lora_plus
from reparam.train.config import OptimConfig, dump, resolve
from reparam.train.job import Result
from reparam.train.optimizer import check_optimizer
from reparam.train.run import train
from reparam.train.show import Show

ASSETS = Path(__file__).parents[2] / "assets"
SITES = {"a": Site("a", "linear", 4, 8), "b": Site("b", "embedding", 9, 8)}


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def summary(groups: list[dict[str, Any]]) -> Counter[tuple[float, float, tuple[int, ...]]]:
    """Rates, weight decay, and sizes of parameters; PEFT holds embeddings' factors the other way round."""
    return Counter(
        (g["lr"], g["weight_decay"], tuple(sorted(p.numel() for p in g["params"]))) for g in groups if g["params"]
    )


# ---- the groups


def test_groups_are_those_of_peft() -> None:
    """Factors, biases, an adapted embedding, a matrix that trains whole."""
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
    """A core with one dimension (AdaLoRA's) learns as A; a gain (DoRA's) as B, or as A on request; routers as A."""
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
    with pytest.raises(ValueError, match=r"1 parameters are frozen \(first: a.B\); call adapter.requires_grad_"):
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


# ---- whole runs


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny base with biases, rows, and the rest of a short run with every kind of group."""
    folder = tmp_path_factory.mktemp("lora_plus")
    save_base(folder / "base", attention_bias=True, tie_word_embeddings=False)
    lines = (ASSETS / "tasks" / "signatures" / "train.jsonl").read_text().splitlines()[:60]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "base.path": str(folder / "base"),
        "data.train": str(folder / "rows.jsonl"),
        "data.score_rows": 1,
        "adapter.targets": "q_proj,up_proj,embed_tokens",
        "adapter.modules_to_save": "model.norm",
        "adapter.bias": True,
        "optim.learning_rate": 0.002,
        "optim.weight_decay": 0.1,
        "run.max_steps": 4,
        "run.batch_size": 2,
    }


def go(common: dict[str, Any], output: Path, *, stop: int = 0, **optim: Any) -> tuple[Result, str]:
    """A run, and what it printed."""
    text = io.StringIO()
    console = Console(file=text, width=200)
    overrides = {**common, "run.output": str(output), **{f"optim.{key}": value for key, value in optim.items()}}
    show = Stopping(console, stop) if stop else Show(console)
    return train(resolve(None, overrides), show=show), text.getvalue()


def adapter_bytes(output: Path) -> bytes:
    return (output / "adapter" / "adapter.safetensors").read_bytes()


def test_a_ratio_of_one_is_lora_bit_for_bit(common: dict[str, Any], tmp_path: Path) -> None:
    """Weight decay, biases, a norm that trains whole: the groups divide transformers' two. Files have no trace."""
    linear = common | {"adapter.targets": "q_proj,up_proj"}
    _, printed = go(linear, tmp_path / "plain")
    go(linear, tmp_path / "one", lora_plus=1)
    assert adapter_bytes(tmp_path / "plain") == adapter_bytes(tmp_path / "one")
    described = [(tmp_path / name / "adapter" / "adapter.json").read_bytes() for name in ("plain", "one")]
    assert described[0] == described[1]
    assert "LoRA+" not in printed
    figures = json.loads((tmp_path / "plain" / "figures.json").read_text())
    assert (figures["LoRA+ ratio"], figures["LoRA+ groups"]) == (None, [])


def test_one_step_of_a_run_moves_b_ratio_times_as_far(common: dict[str, Any], tmp_path: Path) -> None:
    linear = common | {"adapter.targets": "q_proj", "run.max_steps": 1, "optim.schedule": "constant"}
    linear |= {"adapter.bias": False, "adapter.modules_to_save": "", "optim.weight_decay": 0.0}
    for ratio in (1, 16):
        go(linear, tmp_path / str(ratio), name="sgd", lora_plus=ratio, warmup=0, learning_rate=0.25)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("1", "16"))
    for name in one:
        factor = 16 if name.endswith(".B") else 1
        assert one[name].any()
        assert torch.equal(two[name], factor * one[name])


def test_a_run_shows_its_groups_and_paged_states_change_nothing(common: dict[str, Any], tmp_path: Path) -> None:
    _, printed = go(common, tmp_path / "torch", lora_plus=16, lora_plus_embedding=1e-4)
    pages = {"page": "4KiB", "budget": "12KiB"}
    go(common, tmp_path / "ours", name="paged_adamw_32bit", lora_plus=16, lora_plus_embedding=1e-4, **pages)
    assert adapter_bytes(tmp_path / "torch") == adapter_bytes(tmp_path / "ours")
    figures = json.loads((tmp_path / "ours" / "figures.json").read_text())
    assert figures["LoRA+ ratio"] == 16
    assert figures["paging"]["peak_resident"] < figures["paging"]["total"]
    rates = {g["name"]: (g["rate"], g["multiple"], g["weight_decay"]) for g in figures["LoRA+ groups"]}
    assert rates == {
        "in": (0.002, 1.0, 0.1),
        "embedding": (1e-4, 0.05, 0.1),
        "out": (0.032, 16.0, 0.1),
        "out, no decay": (0.032, 16.0, 0.0),
    }
    assert sum(g["parameters"] for g in figures["LoRA+ groups"]) == figures["trained parameters"]
    line = next(line for line in printed.splitlines() if "out, no decay" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")][1:4] == ["0.032", "16", "0"]


def test_an_interrupted_run_ends_as_one_that_was_not(common: dict[str, Any], tmp_path: Path) -> None:
    settings = {"name": "paged_adamw_8bit", "page": "4KiB", "budget": "12KiB", "lora_plus": 16}
    go(common, tmp_path / "whole", **settings)
    stopped, _ = go(common, tmp_path / "broken", **settings, stop=2)
    assert stopped.signal == signal.SIGTERM
    for changed in (8, 32):
        with pytest.raises(
            ValueError, match=rf"out had 16 times the learning rate, and has {changed} now; .* set optim"
        ):
            go(common, tmp_path / "broken", **{**settings, "lora_plus": changed})
    go(common, tmp_path / "broken", **settings)
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "whole")


def test_a_schedule_that_breaks_the_ratio_ends_the_run(common: dict[str, Any], tmp_path: Path) -> None:
    """GreedyLR has a lowest rate of 0.001, which A's begins below, and leaves changes below 1e-8 out."""
    settings = {"schedule": "greedy", "warmup": 0, "learning_rate": 1e-4, "lora_plus_embedding": 1e-8}
    with pytest.raises(ValueError, match=r"LoRA\+: the learning rate of .*, because 'out' has"):
        go(common | {"run.max_steps": 16, "run.eval_every": 1}, tmp_path / "run", **settings, lora_plus=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_plus": 0.0}, r"optim.lora_plus: LoRA\+: ratio=0.0: expected"),
        ({"lora_plus": math.nan}, r"optim.lora_plus: LoRA\+: ratio=nan: expected"),
        ({"lora_plus": 4.0, "lora_plus_embedding": -1.0}, r"optim.lora_plus: LoRA\+: embedding_lr=-1.0: expected"),
        ({"lora_plus_embedding": 1e-5}, "optim.lora_plus_embedding does nothing without optim.lora_plus"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_read(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_optimizer(OptimConfig(**settings))


def test_nothing_to_give_the_ratio_to_is_named_before_anything_is_written(
    common: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"optim.lora_plus: LoRA\+: of 2 parameters none has the role 'out'"):
        go(common | {"adapter.targets": "embed_tokens", "adapter.modules_to_save": ""}, tmp_path / "run", lora_plus=16)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default:method.name:UserWarning")
def test_the_command_line_takes_the_names_that_users_know(
    common: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [text for key, value in common.items() if key != "adapter.bias" for text in (f"--{key}", str(value))]
    options += ["--method", "lora++", "--loraplus_lr_ratio", "8", "--loraplus_lr_embedding", "1e-5"]
    monkeypatch.setattr("sys.argv", ["reparam", "train", *options, "-o", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "warning: method.name 'lora++' is taken for LoRA+ " in capsys.readouterr().err
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    rates = {group["name"]: group["multiple"] for group in figures["LoRA+ groups"]}
    assert (rates["out"], rates["embedding"]) == (8, pytest.approx(1e-5 / 0.002))


@pytest.mark.parametrize("name", ["lora++", "LoRA++", "loraplusplus", "lora+", "loraplus"])
def test_its_names_as_a_method_are_lora_with_the_usual_ratio(name: str) -> None:
    with pytest.warns(UserWarning, match=r"is taken for LoRA\+ \(Hayou.*: LoRA with optim.lora_plus 16") as caught:
        config = resolve(None, {"method.name": name, "method.r": 4})
    assert ("only method that we know" in str(caught[0].message)) == name.endswith(("++", "plusplus"))
    assert (config.method, config.optim.lora_plus) == (LoRA(r=4), 16.0)
    assert 'name = "lora"' in dump(config)
    with pytest.warns(UserWarning, match="optim.lora_plus 4"):
        assert resolve(None, {"method.name": name, "optim.lora_plus": "4"}).optim.lora_plus == 4.0
