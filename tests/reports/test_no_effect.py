"""What changes nothing, or overflows, is told: in merges, sums, and everything that writes an adapter or a model."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from adapters import trained
from command import reparam as run
from torch import nn

import reparam
from reparam.combine.blend import blend
from reparam.combine.compress import compress
from reparam.hf.models import load_base, save_model
from reparam.io import files


@pytest.mark.parametrize("method", [reparam.LoRA(r=2), reparam.DoRA(r=2), reparam.BitFit(), reparam.Full()])
def test_an_untrained_adapter_merges_without_effect(method: Any) -> None:
    model, base = models.gpt2(), models.frozen(models.gpt2())
    reparam.attach(model, method)
    report = reparam.merge(model)
    assert report.idle
    assert "nothing changed" in str(report)
    assert "nothing changed" in repr(report)
    assert "survives" not in str(report)
    assert models.same(models.frozen(model), base)


def test_a_change_beside_the_sites_is_one() -> None:
    """A bias alone, a whole module alone, one of several sites."""
    model = models.gpt2()
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["c_attn"], bias=True)
    with torch.no_grad():
        next(t for key, t in adapter.tensors().items() if key.endswith(".bias"))[0] += 1
    assert not reparam.merge(model).idle

    model = models.llama()
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["q_proj"], modules_to_save=["lm_head"])
    whole = next(t for key, t in adapter.tensors().items() if key.startswith("lm_head"))
    for step, idle in ((0.0, True), (1.0, False)):
        copied = models.llama()
        own = reparam.attach(copied, reparam.LoRA(r=2), targets=["q_proj"], modules_to_save=["lm_head"])
        with torch.no_grad():
            next(t for key, t in own.tensors().items() if key.startswith("lm_head")).copy_(whole + step)
        assert reparam.merge(copied).idle is idle

    model = models.llama()
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["q_proj"])
    with torch.no_grad():
        next(iter(adapter.updates.values())).B.fill_(0.5)
    report = reparam.merge(model)
    assert not report.idle
    assert "into 2 sites (1 of them unchanged" in str(report)


def test_a_bias_that_overflows_is_refused_before_the_merge() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).half()
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["0"], bias=True)
    with torch.no_grad():
        bias = next(t for key, t in adapter.tensors().items() if key.endswith(".bias"))
        assert bias.dtype == torch.float32
        bias.fill_(1e5)
    with pytest.raises(ValueError, match="bias overflows float16"):
        reparam.merge(model)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two adapters, and an untrained one."""
    found = [tmp_path / name for name in ("one", "two", "untrained")]
    for seed in range(2):
        trained(models.llama(), seed=seed, method=reparam.LoRA(r=2, alpha=4)).save(found[seed])
    reparam.attach(models.llama(), reparam.LoRA(r=2), targets=["q_proj", "up_proj"]).save(found[2])
    return found


@pytest.mark.parametrize(
    ("which", "weights", "options"),
    [
        ([0, 0], [1, -1], {}),
        ([0, 0, 0], [1, 1, -2], {"rank": 2}),
        ([0, 1], [0, 0], {}),
        ([2, 2], [1, 2], {}),
        ([2], [1], {}),
        ([0, 0], [0.3, -0.3], {"space": "factor"}),
        ([0, 0], [1, -1], {"space": "ties"}),
    ],
)
def test_a_sum_without_effect(
    folders: list[Path],
    which: list[int],
    weights: list[float],
    options: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = [folders[i] for i in which]
    found = blend(chosen, weights, **options)
    assert found.idle
    assert "changes nothing" in repr(found)
    with pytest.warns(UserWarning, match="changes nothing"):
        found.save(tmp_path / "saved")
    words = [f"--{key}={value}" for key, value in options.items()]
    told = ["--weights=" + ",".join(map(str, weights))]
    assert run("compose", *chosen, *told, *words, "-o", tmp_path / "out") == 2
    assert "changes nothing" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_sum_with_effect(folders: list[Path], tmp_path: Path) -> None:
    """However small; a base that one adapter alone changes; a single adapter as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for which, weights in (([0, 1], [1e-9, 1e-9]), ([0, 0], [1, -0.999]), ([0, 2], [1, 1]), ([1], [1])):
            found = blend([folders[i] for i in which], weights)
            assert not found.idle
            found.save(tmp_path / "out")


@pytest.mark.parametrize("options", [[], ["--rank=1"], ["--space=ties"], ["--space=factor"], ["--format=peft"]])
@pytest.mark.parametrize("weight", ["1e300", "1e39", "-1e38"])
def test_a_sum_that_overflows(
    folders: list[Path], weight: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compose", *folders[:2], f"--weights={weight},1", *options, "-o", tmp_path / "out") == 2
    assert "overflows float32" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", ["reparam", "peft"])
def test_no_writer_of_an_adapter_writes_nan_or_infinity(
    folders: list[Path], bad: float, format: str, tmp_path: Path
) -> None:
    record = files.read(folders[0])
    key = next(iter(record.tensors))
    record.tensors[key] = record.tensors[key].clone()
    record.tensors[key].view(-1)[0] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        files.write(tmp_path / "out", record, format=format)
    small = compress(folders[0], rank=1)
    broken = dataclasses.replace(small, record=record)
    with pytest.raises(ValueError, match="NaN or infinity"):
        broken.save(tmp_path / "out", format=format)
    model = models.llama()
    adapter = trained(model)
    with torch.no_grad():
        next(iter(adapter.parameters())).view(-1)[0] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        adapter.save(tmp_path / "out", format=format)
    with pytest.raises(ValueError, match="NaN or infinity"):
        reparam.merge(model)
    assert not (tmp_path / "out").exists()


def test_no_model_with_nan_is_written(tmp_path: Path) -> None:
    model = models.llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        save_model(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commands_say_it(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.save_base(tmp_path / "base")
    model = load_base(str(tmp_path / "base"))
    reparam.attach(model, reparam.LoRA(r=2), targets=["q_proj"]).save(tmp_path / "fresh")
    assert run("merge", tmp_path / "merged", "-a", tmp_path / "fresh", "-b", tmp_path / "base") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "nothing changed" in out
    assert "1.0000" not in out
