"""The model `reparam` of EleutherAI's harness: the numbers of its model `hf` with PEFT's adapter, on local tasks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import reparam
from transformers import AutoModelForCausalLM

import reparam as library

QUESTIONS = [("def f(a, b):", ["a, b", "self", "x"], 0), ("def g(self):", ["a", "self, other", "self"], 2)]
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{options[gold]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def tasks(folder: Path) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"q": q, "options": o, "gold": g}) + "\n" for q, o, g in QUESTIONS))
    for name, text in (("choice", CHOICE), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(text.format(file=file))
    return str(folder)


@pytest.fixture
def adapter(base: str, tmp_path: Path) -> Path:
    """A folder with the same adapter in the formats of reparam and of PEFT."""
    found = library.attach(AutoModelForCausalLM.from_pretrained(base), library.LoRA(r=4))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    for form in ("reparam", "peft"):
        found.save(tmp_path / form, format=form)
    return tmp_path


def answers(model: str, arguments: dict[str, Any], folder: str) -> tuple[dict[str, Any], list[Any]]:
    harness = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    found = harness.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["choice", "writing"],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    samples = [sample["resps"] for name in ("choice", "writing") for sample in found["samples"][name]]
    return found["results"], samples


def numbers(samples: list[Any]) -> list[float]:
    return [float(answer[0]) for sample in samples for (answer,) in sample if not isinstance(answer, str)]


def texts(samples: list[Any]) -> list[str]:
    return [answer for sample in samples for (answer,) in sample if isinstance(answer, str)]


def test_the_numbers_are_those_of_hf_with_peft(base: str, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    import reparam.evaluation.harness  # noqa: F401  (registers the model)

    folder = tasks(tmp_path)
    ours, own = answers("reparam", {"base": base, "adapter": str(adapter / "reparam")}, folder)
    theirs, other = answers("hf", {"pretrained": base, "peft": str(adapter / "peft")}, folder)
    alone, plain = answers("reparam", {"base": base}, folder)
    scores = ("acc,none", "acc_norm,none", "exact_match,none")
    assert {k: v for task in ours.values() for k, v in task.items() if k in scores} == {
        k: v for task in theirs.values() for k, v in task.items() if k in scores
    }
    assert len(numbers(own)) == 6
    assert numbers(own) == pytest.approx(numbers(other), abs=1e-4)
    assert texts(own) == texts(other)
    assert numbers(own) != pytest.approx(numbers(plain), abs=1e-2)
    assert alone.keys() == ours.keys()


def test_the_command(base: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    place = ["--tasks", "choice", "--include_path", tasks(tmp_path), "--device", "cpu"]
    arguments = ["--model_args", f"base={base},adapter={adapter / 'reparam'}"]
    assert reparam("lm_eval", "--model", "reparam", *arguments, *place) == 0
    first = capsys.readouterr().out
    assert "choice" in first
    assert "acc" in first
    assert reparam("lm_eval", *arguments, *place) == 0
    assert first == capsys.readouterr().out
    for wrong, said in (
        (f"pretrained={base}", "takes base instead"),
        (f"base={base},adapter={tmp_path / 'none'}", str(tmp_path / "none")),
        (f"base={base},adapter={adapter / 'reparam'},task=sums", "the adapter has no tasks"),
        ("dtype=float32", "--base"),
    ):
        assert reparam("lm_eval", "--model_args", wrong, *place) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert said in error


def test_without_the_harness(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "reparam.evaluation.harness"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert reparam("lm_eval", "--tasks", "arc_easy") == 2
    assert "pip install 'reparam[lm-eval]'" in " ".join(capsys.readouterr().err.split())
