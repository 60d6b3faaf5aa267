"""Messages about targets name a few modules for each problem, and numbers agree with their nouns."""

from __future__ import annotations

import re
from pathlib import Path

import models
import pytest
from adapters import trained
from command import reparam as run
from torch import nn

import reparam
from reparam.combine.compress import compress


def refused(model: nn.Module, targets: str | list[str]) -> str:
    with pytest.raises(ValueError, match="targets: ") as error:
        reparam.attach(model, reparam.LoRA(r=2), targets=targets)
    return str(error.value)


def test_many_modules_of_one_problem_are_listed_once() -> None:
    model = nn.ModuleDict({f"b{i}": nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3)}) for i in range(30)})
    model["act"], model["linear"] = nn.ReLU(), nn.Linear(3, 3)
    told = refused(model, ["conv", "act"])
    assert "b0.conv, b1.conv, b2.conv, b3.conv, b4.conv and 25 more: Conv2d is not supported" in told
    assert told.count("Conv2d") == 1
    assert "act: ReLU is not supported" in told


def test_many_targets_without_a_match() -> None:
    told = refused(models.llama(), ["q_prj", *(f"z{i}" for i in range(30))])
    assert "'q_prj' matches no module (did you mean 'q_proj'" in told
    assert "'z3' matches no module" in told
    assert "26 more targets without a match" in told
    assert told.count("possible path endings are") == 1
    assert len(told) < 600


def test_an_invalid_expression_is_one_problem() -> None:
    told = refused(models.llama(), ["re:(", "q_proj"])
    assert "not a valid regular expression" in told
    assert "matches no module" not in told


@pytest.mark.filterwarnings("default:search. budget")
def test_one_and_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = re.compile(r"\b1 (matrices|sites|rows|modules|parameters|runs|steps|candidates|examples|passes|bytes)\b")
    models.save_base(tmp_path / "base")
    model = models.llama()
    adapter = trained(model, method=reparam.LoRA(r=2), targets=["model.layers.0.self_attn.q_proj"])
    adapter.save(tmp_path / "one")
    texts = [repr(adapter), repr(compress(tmp_path / "one", rank=1)), str(reparam.merge(model))]
    told = str(reparam.quantize(nn.Sequential(nn.Linear(64, 64)), "int8"))
    assert "quantized 1 matrix into int8" in told
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a b", "completion": " c"}\n')
    one, base = tmp_path / "one", tmp_path / "base"
    from reparam.hf.models import load_base

    trained(load_base(str(base)), method=reparam.LoRA(r=2), targets=["model.layers.0.self_attn.q_proj"]).save(
        tmp_path / "own"
    )
    for command in (
        ["inspect", one],
        ["compress", one, tmp_path / "small", "--rank", 1],
        ["compose", one, one, "-o", tmp_path / "sum"],
        ["compose", tmp_path / "own", "--search", few, "--budget", 1, "-b", base, "-o", tmp_path / "found"],
        ["quantize", base, tmp_path / "q", "--targets", "model.layers.0.self_attn.q_proj", "--block", 32],
        ["merge", tmp_path / "merged", "-a", tmp_path / "own", "-b", base],
        ["eval", rows, "-b", base],
    ):
        code = run(*command)
        out, err = capsys.readouterr()
        assert code in (0, 2), err
        texts += [out, err]
    texts.append(told)
    assert [found[0] for text in texts for found in wrong.finditer(" ".join(text.split()))] == []
    assert any("on 1 site" in text for text in texts)
