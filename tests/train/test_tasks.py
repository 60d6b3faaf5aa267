"""`reparam train --task`: every task end to end, and its files against PEFT and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import reparam
from peft import AutoPeftModelForSeq2SeqLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from task_bases import rows, save, write
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from reparam.io.files import read
from reparam.io.native import read_json
from reparam.tasks.evaluate import opened

BASES = {
    "classification": "bert",
    "regression": "llama",
    "token-classification": "roberta",
    "seq2seq": "t5",
    "embedding": "bert",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save(kind, folder / kind) for kind in ("bert", "roberta", "llama", "t5")}


def train(bases: dict[str, str], task: str, folder: Path, *more: object, steps: int = 12) -> int:
    name = "classification" if task == "regression" else task
    data = write(folder / f"{task}.jsonl", rows(task))
    usual = ["--max_steps", steps, "--lr", 0.02, "--data.holdout", 0.25, "--eval_steps", 6, "--batch_size", 8]
    base = bases[BASES[task]]
    return reparam("train", "--task", name, "--base", base, "--data", data, "-o", folder / "out", *usual, *more)


METRICS = {
    "classification": "accuracy",
    "regression": "pearson",
    "token-classification": "span_f1",
    "seq2seq": "rouge_l",
    "embedding": "mrr",
}


class Runs(dict[str, Path]):
    """The folder of a run of each task, which trains when it is first asked for."""

    def __init__(self, bases: dict[str, str], make: pytest.TempPathFactory) -> None:
        super().__init__()
        self._bases, self._make = bases, make

    def __missing__(self, task: str) -> Path:
        self[task] = self._make.mktemp(task)
        assert train(self._bases, task, self[task], "--run.metric", METRICS[task], "--run.best") == 0
        return self[task]


@pytest.fixture(scope="module")
def trained(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Runs(bases, tmp_path_factory)


def scores(folder: Path, when: str) -> dict[str, float]:
    return {each["name"]: each["value"] for each in read_json(folder / "out" / "figures.json")[when]}


@pytest.mark.parametrize("task", BASES)
def test_every_task_learns_is_scored_and_predicts(trained: dict[str, Path], tmp_path: Path, task: str) -> None:
    before, after = scores(trained[task], "before"), scores(trained[task], "after")
    assert after["loss"] < before["loss"]
    metric = list(after)[1]
    assert after[metric] > before[metric] or task == "seq2seq"
    file = tmp_path / "predictions.jsonl"
    held = write(tmp_path / "held.jsonl", rows(task)[:5])
    assert reparam("eval", held, "--adapter", trained[task] / "out", "--predictions", file, "--json") == 0
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["source"].rpartition(":")[2] for row in found] == ["1", "2", "3", "4", "5"]
    if task == "classification":
        assert [row["prediction"] for row in found] == [row["label"] for row in rows(task)[:5]]
    if task == "token-classification":
        assert [row["prediction"] for row in found] == [row["ner_tags"] for row in rows(task)[:5]]


TEXTS = ["red dog", "a", "blue blue green cow"]


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    model.config.pad_token_id = model.get_base_model().config.pad_token_id = tokenizer.pad_token_id
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model.eval()(**{key: batch[key] for key in ("input_ids", "attention_mask")})
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


CLASSES = {
    "classification": (AutoModelForSequenceClassification, {"num_labels": 2}),
    "regression": (AutoModelForSequenceClassification, {"num_labels": 1}),
    "token-classification": (AutoModelForTokenClassification, {"num_labels": 2}),
    "embedding": (AutoModel, {}),
}


@pytest.mark.parametrize("task", CLASSES)
def test_peft_computes_the_same_from_the_saved_files(
    bases: dict[str, str], trained: dict[str, Path], tmp_path: Path, task: str
) -> None:
    ours = opened(None, trained[task] / "out")
    assert ours.adapter is not None
    ours.adapter.save(tmp_path / "peft", format="peft")
    kind, more = CLASSES[task]
    theirs = PeftModel.from_pretrained(kind.from_pretrained(bases[BASES[task]], **more), tmp_path / "peft")
    kinds = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "token-classification": "TOKEN_CLS"}
    assert theirs.active_peft_config.task_type == kinds.get(task, "FEATURE_EXTRACTION")
    batch = ours.tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = ours.model(**{key: batch[key] for key in ("input_ids", "attention_mask")})
    found = out.logits if hasattr(out, "logits") else out.last_hidden_state
    torch.testing.assert_close(logits(theirs, ours.tokenizer), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "task_type"), [("bert", "SEQ_CLS"), ("roberta", "TOKEN_CLS"), ("llama", "SEQ_CLS")])
def test_an_adapter_of_peft_gives_the_same_logits(
    bases: dict[str, str], tmp_path: Path, kind: str, task_type: str
) -> None:
    cls = AutoModelForTokenClassification if task_type == "TOKEN_CLS" else AutoModelForSequenceClassification
    torch.manual_seed(1)
    base = cls.from_pretrained(bases[kind], num_labels=3)
    if kind == "bert":  # its pooler, which PEFT does not save, must be in the files
        base.save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(bases[kind]).save_pretrained(tmp_path / "base")
    path = str(tmp_path / "base") if kind == "bert" else bases[kind]
    theirs = get_peft_model(base, LoraConfig(task_type=task_type, r=4, init_lora_weights=False))
    theirs.peft_config["default"].base_model_name_or_path = path
    theirs.save_pretrained(tmp_path / "peft")
    ours = opened(path, tmp_path / "peft")
    assert ours.head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    batch = ours.tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        found = ours.model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(found, logits(theirs, ours.tokenizer), rtol=1e-5, atol=1e-5)


def test_peft_reads_a_seq2seq_adapter(bases: dict[str, str], trained: dict[str, Path], tmp_path: Path) -> None:
    ours = opened(None, trained["seq2seq"] / "out")
    assert ours.adapter is not None
    ours.adapter.save(tmp_path / "peft", format="peft")
    theirs = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "peft")
    batch = {"input_ids": torch.tensor([[7, 8, 9]]), "decoder_input_ids": torch.tensor([[1, 4]])}
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(**batch).logits, ours.model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_the_labels_are_shown_and_the_merged_model_is_a_plain_classifier(
    bases: dict[str, str], trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained["classification"] / "out"
    assert reparam("inspect", out) == 0
    assert "classification; 2 classes: animal, color" in capsys.readouterr().out
    assert reparam("generate", "red red", "--adapter", out) == 0
    assert capsys.readouterr().out.startswith("color 0.")
    assert reparam("merge", tmp_path / "merged", "--adapter", out) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert plain.config.id2label == {0: "animal", 1: "color"}
    ours = opened(None, out)
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours.model(ids).logits, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    held = write(tmp_path / "held.jsonl", rows("classification")[:6])
    assert reparam("eval", held, "--base", tmp_path / "merged", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["name"]: each["value"] for each in found["base"]}["accuracy"] == 1.0


def test_a_resumed_run_equals_an_uninterrupted_one(bases: dict[str, str], tmp_path: Path) -> None:
    """With the dropout of BERT and of the adapter; the run ends as if it was killed after step 2."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    more = ("--method.dropout", 0.1, "--run.accumulation", 2, "--save_steps", 2)
    assert train(bases, "classification", whole, *more, steps=4) == 0
    shutil.copytree(whole, parts)
    for name in ("checkpoint-4", "adapter"):
        shutil.rmtree(parts / "out" / name)
    assert train(bases, "classification", parts, *more, steps=4) == 0
    one, other = (read(folder / "out" / "adapter").tensors for folder in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_loss_is_the_mean_over_all_micro_batches(bases: dict[str, str], tmp_path: Path) -> None:
    """Rows with unequal numbers of words: a batch of 8 gives the adapter of four batches of 2."""
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"classifier_dropout": 0.0}))
    data = [
        {"tokens": ["red", "dog", "cow"][: 1 + i % 3] * (1 + i % 2), "tags": ["O", "B", "O"][: 1 + i % 3] * (1 + i % 2)}
        for i in range(24)
    ]
    rows_file, found = write(tmp_path / "rows.jsonl", data), []
    for size, parts in ((8, 1), (2, 4)):
        call = ["--task", "token-classification", "--base", base, "--data", rows_file, "--max_steps", 2, "--lr", 0.02]
        out = tmp_path / str(size)
        assert reparam("train", *call, "--batch_size", size, "--gradient_accumulation_steps", parts, "-o", out) == 0
        found.append(load_file(out / "adapter" / "adapter.safetensors"))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-6)


def test_a_quantized_base_keeps_its_head_dense(bases: dict[str, str], tmp_path: Path) -> None:
    assert train(bases, "classification", tmp_path, "--storage", "nf4", "--method", "dora") == 0
    assert scores(tmp_path, "after")["loss"] < scores(tmp_path, "before")["loss"]
    model = opened(None, tmp_path / "out").model
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    heads = {dtype for name, dtype in kinds.items() if name.startswith("classifier.")}
    assert heads == {torch.float32}
    assert any(dtype == torch.uint8 for dtype in kinds.values())


@pytest.mark.parametrize(
    ("task", "lines", "more", "said"),
    [
        ("classification", [{"text": "a", "label": "x"}, {"text": "b"}], (), 'rows.jsonl:2: no "label"'),
        ("classification", [{"text": "a", "label": "x"}] * 4, (), "all rows have the label 'x'"),
        ("classification", [{"a": "x", "b": "y", "c": "z", "label": 1}], (), "--data.columns text=a,text_pair=b"),
        ("classification", [{"text": "a", "label": -1}], (), 'rows.jsonl:1: "label" is -1'),
        ("token-classification", [{"tokens": ["a", "b"], "tags": ["O"]}], (), "2 words and 1 tags"),
        ("embedding", [{"anchor": "a", "positive": "b"}, {"a": "a", "b": "b", "c": "c"}] * 9, (), "or to none"),
        ("seq2seq", [{"messages": [{"role": "user", "content": "a"}]}], (), "chats are for causal"),
        ("classification", [], ("--packing",), "data.packing: the task classification does not support it"),
        ("classification", [], ("--streaming",), "data.streaming"),
        ("classification", [], ("--objective", "dpo"), "run.objective: dpo is for causal language models"),
        ("classification", [], ("--chat_template", "chatml"), "data.chat_template"),
        ("classification", [], ("--run.pooling", "cls"), "run.pooling"),
        ("classification", [], ("--run.metric", "rouge_l"), "has no rouge_l"),
        ("seq2seq", [{"input": "a", "target": "b"}] * 9, (), "is no encoder-decoder model"),
        ("classification", [{"text": "a", "label": i % 2} for i in range(40)], ("--method", "prefix"), "causal"),
    ],
)
def test_mistakes_get_one_sentence(
    bases: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    lines: list[dict[str, Any]],
    more: tuple[str, ...],
    said: str,
) -> None:
    file = write(tmp_path / "rows.jsonl", lines or [{"text": "a", "label": 0}])
    out = tmp_path / "out"
    assert reparam("train", "--task", task, "--base", bases["bert"], "--data", file, "-o", out, *more) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert said in told
    assert "Traceback" not in told
    assert not out.exists()


def test_a_label_of_held_out_rows_alone_is_refused(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "train.jsonl", [{"text": "a", "label": x} for x in ("yes", "no")])
    valid = write(tmp_path / "valid.jsonl", [{"text": "a", "label": x} for x in ("yes", "maybe")])
    more = ("--data.valid", valid, "-o", tmp_path / "out")
    assert reparam("train", "--task", "classification", "--base", bases["bert"], "--data", file, *more) == 2
    assert "valid.jsonl:2: the label 'maybe' is in no training row" in " ".join(capsys.readouterr().err.split())


def test_a_base_for_a_task_is_named_without_the_option(
    bases: dict[str, str], trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reparam("merge", tmp_path / "merged", "--adapter", trained["classification"] / "out") == 0
    for base, task in ((tmp_path / "merged", "classification"), (bases["t5"], "seq2seq")):
        file = write(tmp_path / "rows.jsonl", [{"text": "red dog"}] * 20)
        capsys.readouterr()
        assert reparam("train", "--base", base, "--data", file, "-o", tmp_path / "out") == 2
        assert f"pass --task {task}" in " ".join(capsys.readouterr().err.split())


def test_plan_compare_and_intrinsic(bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "rows.jsonl", rows("classification"))
    usual = ("--task", "classification", "--base", bases["bert"], "--data", data)
    assert reparam("plan", *usual) == 0
    assert "longest text" in capsys.readouterr().out
    more = ("--max_steps", 8, "--data.holdout", 0.2, "--seeds", 1, "--rates", 0.02)
    out = tmp_path / "compared"
    assert reparam("compare", *usual, *more, "--methods", "lora,full", "-o", out) == 0
    assert read_json(out / "results.json")["metric"] == "accuracy"
