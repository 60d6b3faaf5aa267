"""Small faults that reading the code has shown, each beside its neighbours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from models import llama, save_base
from rich.console import Console
from torch import nn

import reparam
from reparam.combine.compress import compress
from reparam.compare.plan import read_plan
from reparam.compare.recommend import recommend
from reparam.core.registry import STORAGES
from reparam.errors import ConfigError, FormatError
from reparam.hf.models import load_base
from reparam.kernels.fastfood import fastfood, fastfood_adjoint
from reparam.recipes import merge as recipe
from reparam.train.plot import plot_losses
from reparam.weights.layouts import layout_of


@pytest.mark.parametrize("sizes", [(8, 6), (6, 8), (8, 8)])
@pytest.mark.parametrize("router", ["token", "sequence"])
@torch.no_grad()
def test_a_router_reads_the_activation_that_vectors_rescale(sizes: tuple[int, int], router: str) -> None:
    model = nn.Sequential(nn.Linear(*sizes))
    method = reparam.Mixture(n=3, kind="vectors", router=router, route_on="activation", pool="all")
    adapter = reparam.attach(model, method, targets=["0"])
    for parameter in adapter.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    (vectors, _), (weight, _) = ((p.double(), name) for name, p, _ in list(adapter.named_parameters())[:2])
    x = torch.randn(2, 4, sizes[0], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    base: Any = model[0]
    y = nn.functional.linear(x, base.weight.double())
    read = y if router == "token" else nn.functional.normalize(y.mean(1, keepdim=True), dim=-1)
    gates = torch.softmax(read @ weight.t(), -1)  # [2, 4 or 1, 3]
    assert torch.allclose(model(x.float()).double(), y * (gates @ vectors) + base.bias.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [reparam.LoRA(), reparam.DoRA()])
def test_ranks_that_are_all_zero_are_refused(method: reparam.LoRA) -> None:
    with pytest.raises(ValueError, match=f"{method.name}: every site has rank 0"):
        method.with_ranks({"a": 0, "b": 0})
    assert method.with_ranks({"a": 0, "b": 3}).r == 3


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "lr": ["a", True, None, float("nan"), float("inf"), -1, torch.ones(2), torch.tensor(float("nan"))],
        "eps": ["a", True, None, float("nan"), float("inf"), -1],
        "weight_decay": ["a", True, None, float("nan"), float("inf"), -1],
        "betas": [0.9, (0.9,), ("a", 0.9), (True, 0.9), (0.9, float("nan")), (0.9, 1.0), (0.9, 0.9, 0.9), None, "ab"],
        "bits": [True, [8], "8", 16, None, 8.5],
        "page": [1e6, "1MiB", True, None, 3, -1],
        "budget": [1e6, "1MiB", True, 3, -1],
        "folder": [3, True, "/nothing/here"],
    }.items(),
)
def test_settings_of_the_paged_optimizer_are_refused_by_name(key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=key):
            reparam.optim.PagedAdamW([nn.Parameter(torch.ones(4))], **{key: value})
    reparam.optim.PagedAdamW([nn.Parameter(torch.ones(4))], lr=torch.tensor(0.1))


def test_a_negative_key_of_fastfood_is_refused() -> None:
    with pytest.raises(ValueError, match="key=-1"):
        fastfood(torch.ones(3), -1, 4, 5)
    with pytest.raises(ValueError, match="key=-1"):
        fastfood_adjoint(torch.ones(5), -1, 4, 3)
    assert fastfood(torch.ones(3), 2**63 - 1, 4, 5).isfinite().all()


class Halves(reparam.Weight):
    """A storage of another package: float16."""

    def __init__(self, w: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(w.half(), requires_grad=False)


class Other(reparam.Storage):
    name = "halves"

    def quantize(self, w: torch.Tensor) -> Halves:
        return Halves(w)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"a\.weight\.values is missing"),
        ({"a.weight": torch.zeros(2, 3)}, r"a\.weight\.values is missing"),
        ({"a.weight.values": torch.zeros(2, 3).half(), "a.weight.more": torch.zeros(1)}, r"a\.weight\.more is unknown"),
        ({"a.weight.values": torch.zeros(3, 2).half()}, r"is float16 \[3, 2\], expected float16 \[2, 3\]"),
    ],
)
def test_the_plain_layout_names_what_is_missing_or_unknown(state: dict[str, torch.Tensor], message: str) -> None:
    assert "halves" not in STORAGES
    with pytest.raises(FormatError, match=message):
        layout_of(Other()).weight_from(state, "a", (2, 3))


def test_the_plain_layout_reads_its_own_tensors_only() -> None:
    state = {"a.weight.values": torch.ones(2, 3).half(), "a.weights": torch.ones(1), "a.weight_norm": torch.ones(1)}
    weight: Any = layout_of(Other()).weight_from(state, "a", (2, 3))
    assert torch.equal(weight.values, torch.ones(2, 3).half())


@pytest.mark.parametrize("metric", ["exact match", "F1", "loss per token"])
def test_whether_larger_scores_are_better_does_not_depend_on_their_name(metric: str) -> None:
    values = {"a": {0: 0.1, 1: 0.11, 2: 0.1}, "b": {0: 0.9, 1: 0.91, 2: 0.9}}
    for larger, best in ((True, "b"), (False, "a")):
        said = recommend(values, {"a": 1, "b": 1}, "a", metric, failed=set(), base=0.5, larger=larger)
        assert said.startswith(f"Take {best}: "), said


def test_a_plan_says_nothing_about_lora_plus_but_other_warnings_pass(tmp_path: Path) -> None:
    overrides = {"base.path": "model", "data.train": "rows.jsonl", "compare.methods": "lora++"}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read_plan(None, overrides)
    assert told == []
    with pytest.warns(FutureWarning, match=r"base\.packed"):
        read_plan(None, {**overrides, "base.packed": "all-linear"})


def test_new_biases_are_refused_before_anything_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(tmp_path / "base")
    model = load_base(str(tmp_path / "base"))
    adapter = reparam.attach(model, reparam.BitFit(create=True), targets=["q_proj"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1)
    adapter.save(tmp_path / "adapter")
    merged: list[bool] = []
    monkeypatch.setattr(recipe, "merge", lambda *a, **k: merged.append(True))
    told = {"dtype": "auto", "console": Console(quiet=True)}
    with pytest.raises(ValueError, match=r"cannot load model\.layers\.0\.self_attn\.q_proj\.bias"):
        recipe.merge_to(tmp_path / "out", str(tmp_path / "base"), str(tmp_path / "adapter"), **told)  # type: ignore[arg-type]
    assert not merged
    assert not (tmp_path / "out").exists()


def test_a_compression_to_nothing_is_one_sentence(tmp_path: Path) -> None:
    model = llama()
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["q_proj"])
    adapter.save(tmp_path / "a")  # B is zero
    with pytest.raises(ValueError, match=r"rank|empty|zero|changes nothing") as caught:
        compress(tmp_path / "a", energy=0.9).save(tmp_path / "b")
    assert "max()" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"storages": "nf4"}, "entry 1: storages: expected a list of texts"),
        ({"ranks": 5}, "entry 1: ranks: expected a list of whole numbers"),
        ({"ranks": [True]}, "entry 1: ranks: expected a list of whole numbers"),
        ({"label": [1]}, "entry 1: label: expected a text"),
        ({"optim": 3}, "entry 1: optim: expected a table"),
        ({"name": 3}, "entry 1: name: expected a text"),
        ({"r": []}, "lora: r: the list is empty"),
        ({"r": [*range(1, 101)], "alpha": [*range(1, 101)]}, "10,000 contestants, more than 1,000"),
    ],
)
def test_entries_of_a_plan_are_checked_by_key(entry: dict[str, Any], message: str) -> None:
    overrides = {"base.path": "model", "data.train": "rows.jsonl", "compare.methods": [{"name": "lora", **entry}]}
    with pytest.raises(ConfigError, match=message):
        read_plan(None, overrides)


@pytest.mark.parametrize("steps", [1, 2, 3, 300])
def test_the_ticks_of_a_loss_plot_are_whole_steps(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("reparam.train.plot.write_png", lambda figure, file: drawn.append(figure))
    history = [{"step": step, "loss": 1 / step} for step in range(1, steps + 1)]
    plot_losses([*history, {"step": steps, "eval_loss": 0.5}], tmp_path / "loss.png")
    (axes,) = drawn[0].axes
    left, right = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    assert ticks
    assert all(float(tick).is_integer() for tick in ticks)
    assert steps > 1 or axes.lines[0].get_marker() == "o"  # a single point without a marker cannot be seen
