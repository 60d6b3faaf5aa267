"""`reparam compose` as a user meets it: sums, copies, what was lost, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import trained
from command import reparam
from transformers import AutoModelForCausalLM

import reparam as library
from reparam import DoRA, LoRA
from reparam.io import files


@pytest.fixture(scope="module")
def parts(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    methods = {"a": LoRA(r=2, alpha=4), "b": LoRA(r=3, scaling="rslora"), "c": LoRA(r=2, alpha=4), "d": DoRA(r=2)}
    for seed, (name, method) in enumerate(methods.items()):
        model = AutoModelForCausalLM.from_pretrained(base)
        trained(model, seed=seed, method=method).save(folder / name, format="peft" if name == "b" else "reparam")
    return folder


def test_a_sum_is_exact_and_loads(
    parts: Path,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "mix"
    assert reparam("compose", parts / "a", parts / "b", "--weights", "0.5,-0.25", "--output", out) == 0
    told = capsys.readouterr().out
    assert "exact: no approximation error on any of 4 sites, rank 5" in told
    assert "-0.2500 x" in told
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        library.load(model, out)
        found = model(ids).logits
        library.remove(model, "default")
        for name, w in (("a", 0.5), ("b", -0.25)):
            library.load(model, parts / name)
            for module in library.adapters(model)["default"].modules.values():
                factors = module.updates["default"].factors(module.frozen)  # type: ignore[operator]
                module.frozen.dense_or_none.add_(w * factors.B @ factors.A)  # type: ignore[union-attr]
            library.remove(model, "default")
        assert (model(ids).logits - found).abs().max() < 1e-4


def test_a_rank_says_what_it_lost(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for space in ("delta", "ties", "dare"):
        more = ["--space", space, "--rank", 2, "-o", tmp_path / space]
        assert reparam("compose", parts / "a", parts / "c", *more) == 0
        told = capsys.readouterr().out
        assert "error over all sites: 0." in told
        assert "survives" in told
        assert "q_proj" in told
        assert files.read(tmp_path / space).method.settings()["r"] == 2


def test_one_adapter_is_copied(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("compose", parts / "d", "--weights", "1", "-o", tmp_path / "copy") == 0
    assert "copied bit for bit" in capsys.readouterr().out
    one, other = files.read(parts / "d"), files.read(tmp_path / "copy")
    assert one.method == other.method
    assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)


def test_a_gain_is_added_with_the_base(parts: Path, base: str, tmp_path: Path) -> None:
    more = ["--base", base, "--rank", 16, "-o", tmp_path / "out"]
    assert reparam("compose", parts / "a", parts / "d", *more) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A", "B", "--weights", "0.5"], "expected one weight per adapter (2), found 1"),
        (["A", "B", "--weights", "0.5,x"], "'x' is not a number"),
        (["A", "B", "--weights", "nan,1"], "weight 1 is nan"),
        (["A", "B", "--space", "mean"], "expected one of delta, factor, ties, dare"),
        (["A", "B", "--space", "factor"], "use space='delta', which can sum"),
        (["A", "D"], "a sum needs the base"),
        (["A", "NONE"], "no such folder"),
        (["A", "C", "--rank", "0"], "rank=0"),
        (["A", "C", "--format", "onnx"], "expected one of reparam, peft"),
    ],
)
def test_one_sentence_for_each_mistake(
    arguments: list[str], message: str, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"A": parts / "a", "B": parts / "b", "C": parts / "c", "D": parts / "d", "NONE": tmp_path / "none"}
    assert reparam("compose", *[places.get(a, a) for a in arguments], "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_output_is_not_an_input(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("compose", parts / "a", parts / "c", "-o", parts / "a") == 2
    assert "is the folder of an input adapter" in capsys.readouterr().err
