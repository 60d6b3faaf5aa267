"""Experts in a run: their rank divided by the number of experts of a token, and their sites in `inspect`."""

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from moe import build, trained

import reparam
from reparam.errors import ConfigError
from reparam.inspect.show import _together
from reparam.inspect.summary import summarize
from reparam.train.model import divided
from reparam.train.show import of_experts


def test_the_rank_of_experts_is_divided_by_those_of_a_token() -> None:
    model = build("Qwen3Moe")  # 2 of 4 experts
    adapter = reparam.attach(model, divided(reparam.LoRA(r=8, rank_pattern={"o_proj": 3}), model))
    ranks = {path: len(update.A) for path, update in adapter.updates.items()}  # type: ignore[arg-type]
    assert {rank for path, rank in ranks.items() if ".experts." in path} == {4}
    assert {rank for path, rank in ranks.items() if path.endswith("o_proj")} == {3}
    assert {rank for path, rank in ranks.items() if path.endswith("q_proj")} == {8}
    least = reparam.attach(model, divided(reparam.LoRA(r=1), model), name="least")
    assert {len(update.A) for update in least.updates.values()} == {1}  # type: ignore[arg-type]


def test_what_experts_take_is_told() -> None:
    model = build("Qwen3Moe", num_hidden_layers=1)  # 4 experts: gate_up_proj 32 x 32, down_proj 32 x 16
    hint = of_experts(reparam.attach(model, reparam.LoRA(r=2)))
    count = 4 * 2 * (32 + 32 + 32 + 16)
    assert f"experts have {count:,} of these parameters, which take {16 * count / 1024:.0f} KiB" in str(hint)
    assert of_experts(reparam.attach(models.llama(), reparam.LoRA(r=2))) is None


@pytest.mark.parametrize(
    ("method", "why"),
    [(reparam.Full(), "full has no rank to divide"), (reparam.LoRA(), "no stacked experts|does not tell how many")],
)
def test_a_rank_that_cannot_be_divided_is_refused(method: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        divided(method, models.llama())


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("storage", [None, "nf4"])
def test_inspect_measures_experts_against_the_base(kind: str, storage: str | None, tmp_path: Path) -> None:
    model = build(kind, num_hidden_layers=1)
    if storage:
        reparam.quantize(model, storage)
    adapter = trained(reparam.attach(model, reparam.DoRA(r=2), targets="all-linear"))
    adapter.save(tmp_path)
    weights = {path: module.frozen.dense().clone() for path, module in adapter.modules.items()}
    changes = {p: u.factors(adapter.modules[p].frozen).change(weights[p]) for p, u in adapter.updates.items()}
    reparam.remove(model, "default")
    found = summarize(tmp_path, model)
    for site in found.sites:
        assert site.weight == pytest.approx(float(weights[site.name].norm()), rel=1e-5)
        assert site.change == pytest.approx(float(changes[site.name].norm()), rel=1e-3)
    rows = _together(found.sites)
    assert "model.layers.0.mlp.experts.*.down_proj (4 experts)" in rows
    assert sum(len(sites) for sites in rows.values()) == len(found.sites)
    assert torch.isfinite(torch.tensor([site.change for site in found.sites])).all()
