"""Preference tuning: equal to TRL's trainers with PEFT's LoRA, resumed bit for bit, for any method and storage."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TASK, reparam
from datasets import Dataset
from models import save_base
from rich.console import Console
from safetensors.torch import load_file
from stopping import Stopping
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_settings import PLAIN
from two_processes import two_processes

import reparam as library
from reparam.train.config import Config, resolve
from reparam.train.objectives import objective_of
from reparam.train.run import _trainer as trainer_of
from reparam.train.run import prepare
from reparam.train.run import train as run
from reparam.train.show import Show

STEPS, RATE, R = 4, 0.02, 4
LOGGED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")


def rows(count: int = 14) -> list[dict[str, Any]]:
    """Pairs of messages: the answer of the row, and that of another row."""
    lines = (TASK / "train.jsonl").read_text().splitlines()[:count]
    chats = [json.loads(line)["messages"] for line in lines]
    return [{"prompt": chat[:1], "chosen": chat[1:], "rejected": chats[i - 3][1:]} for i, chat in enumerate(chats)]


def judged(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 3 == 0 else "chosen"], "label": i % 3 != 0}
        for i, row in enumerate(pairs)
    ]


def written(file: Path, found: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


def train(base: str, folder: Path, objective: str, *more: object) -> int:
    pairs = rows()
    made = judged(pairs) if objective == "kto" else pairs
    train_file = written(folder.parent / f"{objective}.jsonl", made)
    valid = written(folder.parent / f"{objective}-valid.jsonl", made[:5])
    steps = ["--max_steps", STEPS, "--batch_size", 4, "--lr", RATE, "--lr_scheduler_type", "constant"]
    steps += ["--warmup_steps", 0, "--logging_steps", 1, "--eval_steps", 2, "--save_steps", 2, "--lora_r", R]
    files = ["--base.path", base, "--data.train", train_file, "--data.valid", valid, "-o", folder]
    return reparam("train", *files, "--objective", objective, *steps, *more)


def history(folder: Path, key: str = "loss") -> list[dict[str, float]]:
    return [entry for entry in json.loads((folder / "figures.json").read_text())["history"] if key in entry]


def untimed(entry: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}


def trl_history(base: str, folder: Path, objective: str) -> list[dict[str, float]]:
    """What TRL's own trainer logs, with PEFT's LoRA that begins with the same factors."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = library.attach(model, library.LoRA(r=R))
    adapter.save(folder / "start", format="peft")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "start", is_trainable=True)
    found = rows()
    settings = {
        "output_dir": str(folder / "trl"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        **PLAIN,
    }
    if objective == "dpo":
        from trl import DPOConfig, DPOTrainer

        made: Any = DPOTrainer(
            model,
            args=DPOConfig(**settings),
            train_dataset=Dataset.from_list(found),
            processing_class=AutoTokenizer.from_pretrained(base),
        )
    elif objective == "kto":
        import random

        from trl import KTOConfig, KTOTrainer

        items = judged(found)
        made = KTOTrainer(
            model,
            args=KTOConfig(**settings),
            train_dataset=Dataset.from_list(random.Random(0).sample(items, len(items))),
            processing_class=AutoTokenizer.from_pretrained(base),
        )
    else:
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        made = ORPOTrainer(
            model,
            args=ORPOConfig(**settings),
            train_dataset=Dataset.from_list(found),
            processing_class=AutoTokenizer.from_pretrained(base),
        )
    made.train()
    return [entry for entry in made.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("untied") / "model"
    save_base(folder, tie_word_embeddings=False)
    return str(folder)


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # TRL's own trainers send none then


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_the_losses_are_those_of_trl_with_peft(base: str, tmp_path: Path, objective: str) -> None:
    assert train(base, tmp_path / "out", objective) == 0
    ours, theirs = history(tmp_path / "out"), trl_history(base, tmp_path, objective)
    assert len(ours) == len(theirs) == STEPS
    for own, other in zip(ours, theirs, strict=True):
        for key in LOGGED:
            if key in other or key in own:
                assert own[key] == pytest.approx(other[key], rel=2e-4, abs=2e-6), (key, own["step"])
    assert abs(ours[2]["rewards/margins"]) > 1e-3


def config(base: str, folder: Path, objective: str, **more: Any) -> Config:
    pairs = rows()
    made = judged(pairs) if objective == "kto" else pairs
    settings = {
        "base.path": base,
        "data.train": str(written(folder.parent / f"{objective}.jsonl", made)),
        "data.valid": str(written(folder.parent / f"{objective}-valid.jsonl", made[:5])),
        "optim.learning_rate": RATE,
        "run.objective": objective,
        "run.batch_size": 4,
        "run.max_steps": STEPS,
        "run.output": str(folder),
    }
    return resolve(None, settings | more)


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_a_resumed_run_equals_an_uninterrupted_one(base: str, tmp_path: Path, objective: str) -> None:
    """The run stops after step 3, between the log entries of the steps 2 and 4, and within an epoch."""
    every = {"run.max_steps": 20, "run.log_every": 2, "run.eval_every": 20, "run.save_every": 20, "run.batch_size": 2}
    every |= {"method.dropout": 0.3, "method.r": R}
    whole, parts = (config(base, tmp_path / name, objective, **every) for name in ("whole", "parts"))
    quiet = Console(quiet=True)
    assert run(whole, show=Show(quiet)).signal is None
    assert run(parts, show=Stopping(quiet, 3)).signal is not None
    assert run(parts, show=Show(quiet)).signal is None
    first, second = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    ours, theirs = ([untimed(entry) for entry in history(tmp_path / name)] for name in ("whole", "parts"))
    assert [entry["step"] for entry in ours][:3] == [2, 4, 6]
    assert "rewards/chosen" in ours[1]
    assert ours == theirs


@pytest.mark.parametrize(
    ("objective", "metric"), [("dpo", "reward_accuracy"), ("orpo", "reward_margin"), ("kto", "reward_margin")]
)
def test_a_run_ends_with_the_best_weights_by_its_metric(
    base: str, tmp_path: Path, objective: str, metric: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All held-out rows are in one batch, so TRL's metrics, which are means over batches, are those over the rows."""
    out = tmp_path / "out"
    more = ("--eval_steps", 1, "--save_steps", 1, "--batch_size", 8, "--max_steps", 5, "--lr", 0.3)
    assert train(base, out, objective, "--run.patience", 1, "--metric_for_best_model", metric, *more) == 0
    found = history(out, "eval_loss")
    theirs = "eval_rewards/accuracies" if metric == "reward_accuracy" else "eval_rewards/margins"
    for entry in found:
        assert entry[f"eval_{metric}"] == pytest.approx(entry[theirs], rel=1e-4, abs=1e-5)
    best = max(found, key=lambda entry: (entry[f"eval_{metric}"], -entry["eval_loss"], -entry["step"]))
    results = json.loads((out / "figures.json").read_text())
    assert results["best step"] == best["step"]
    after = {score["name"].replace(" ", "_"): score["value"] for score in results["after"]}
    assert after[metric] == pytest.approx(best[f"eval_{metric}"])
    kept = load_file(out / f"checkpoint-{best['step']}" / "adapter" / "adapter.safetensors")
    ended = load_file(out / "adapter" / "adapter.safetensors")
    assert all(torch.equal(ended[name], value) for name, value in kept.items())
    said = " ".join(capsys.readouterr().out.split())
    name = metric.replace("_", " ")
    assert f"the best weights are those of step {best['step']} ({name} {best[f'eval_{metric}']:.4f})" in said


def test_metrics_of_other_objectives_are_refused(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(base, tmp_path / "out", "dpo", "--run.metric", "exact_match") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the objective dpo has no exact_match; one of loss, reward_margin, reward_accuracy" in said
    assert train(base, tmp_path / "out", "sft", "--run.metric", "reward_margin") == 2
    assert "the objective sft has no reward_margin" in " ".join(capsys.readouterr().err.split())


CASES = [
    {"method.name": "lora", "method.r": R},
    {"method.name": "dora", "base.storage": "int8"},
    {"method.name": "full"},
    {"base.storage": "nf4", "adapter.bias": True},
    {"base.storage": "nf4", "base.quantized": ("all-linear", "lm_head")},
    {"adapter.targets": ("q_proj", "lm_head")},
    {"adapter.targets": ("q_proj",), "adapter.modules_to_save": ("lm_head",)},
    {"adapter.targets": ("embed_tokens",), "adapter.tie": True},
    {"method.name": "prompt"},
    {"method.name": "prefix"},
]


@pytest.mark.parametrize("more", CASES, ids=lambda more: "-".join(f"{k.split('.')[1]}={v}" for k, v in more.items()))
def test_the_loss_is_that_of_the_formula(base: str, untied: str, tmp_path: Path, more: dict[str, Any]) -> None:
    """In float64, from the logits of the model with the adapter and without it: for any method, storage and head."""
    made = config(base if "adapter.tie" in more else untied, tmp_path / "out", "dpo", **more)
    job, trainer = prepared(made)
    moved(job.adapter)
    batch = trainer.data_collator([{"row": 0}, {"row": 3}, {"row": 5}])
    del batch["row"]
    job.model.train()
    loss = trainer.compute_loss(job.model, dict(batch))
    loss.backward()
    expected = dpo_loss(job.model, batch, beta=0.1)
    assert abs(float(expected) - math.log(2)) > 3e-4
    assert float(loss) == pytest.approx(float(expected), abs=2e-5)
    grads = {name: parameter.grad for name, parameter, _ in job.adapter.named_parameters()}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values()), grads


def prepared(made: Config) -> tuple[Any, Any]:
    objective = objective_of(made)
    job = prepare(made)
    trainer = trainer_of(job, objective, Show(Console(quiet=True)))[0]
    trainer.current_gradient_accumulation_steps = 1  # which `train` sets
    return job, trainer


def moved(adapter: Any) -> None:
    """Change all trained values, as training would."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)


def log_probabilities(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of the answers of a batch, [B] float64."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    each = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(1)


def dpo_loss(model: Any, batch: dict[str, Tensor], *, beta: float, start: str | None = None) -> Tensor:
    model.eval()
    own = log_probabilities(model, batch)
    with library.select(model, start):
        ratios = own - log_probabilities(model, batch)
    chosen, rejected = ratios.chunk(2)
    return -logsigmoid(beta * (chosen - rejected)).mean()


def test_the_reference_is_the_adapter_that_a_run_starts_from(base: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    first = library.attach(model, library.LoRA(r=R))
    moved(first)
    first.save(tmp_path / "first")
    job, trainer = prepared(config(base, tmp_path / "out", "dpo", **{"adapter.start": str(tmp_path / "first")}))
    batch = trainer.data_collator([{"row": 0}, {"row": 1}])
    del batch["row"]
    assert float(trainer.compute_loss(job.model, dict(batch))) == pytest.approx(math.log(2), abs=1e-6)
    moved(job.adapter)
    expected = float(dpo_loss(job.model, batch, beta=0.1, start="__reference"))
    assert abs(expected - math.log(2)) > 1e-3
    assert float(trainer.compute_loss(job.model, dict(batch))) == pytest.approx(expected, abs=1e-5)
    assert {name for name in job.model.state_dict() if "__reference" in name}
    job.adapter.save(tmp_path / "again")
    kept = load_file(tmp_path / "again" / "adapter.safetensors")
    assert kept.keys() == load_file(tmp_path / "first" / "adapter.safetensors").keys()


def test_orpo_and_kto_are_those_of_the_formulas(base: str, tmp_path: Path) -> None:
    job, trainer = prepared(config(base, tmp_path / "out", "kto", **{"optim.beta": 0.3}))
    moved(job.adapter)
    numbers = [0, 1, 2, 3]
    batch = trainer.data_collator([{"row": n} for n in numbers])
    del batch["row"]
    loss = float(trainer.compute_loss(job.model, dict(batch)))
    other = {key.removeprefix("KL_"): value for key, value in batch.items() if key.startswith("KL_")}
    job.model.eval()
    own, kl = log_probabilities(job.model, batch), log_probabilities(job.model, other)
    with library.select(job.model, None):
        own, kl = own - log_probabilities(job.model, batch), kl - log_probabilities(job.model, other)
    z = kl.mean().clamp(min=0)
    good = batch["label"]
    values = torch.where(good, torch.sigmoid(0.3 * (own - z)), torch.sigmoid(0.3 * (z - own)))
    assert loss == pytest.approx(float((1 - values).mean()), abs=1e-5)
    assert good.any()
    assert not good.all()
    for n in numbers:  # each prompt is followed by the answer of the row before
        mine, before = batch["completion_mask"][n].bool(), batch["completion_mask"][n - 1].bool()
        mixed = other["completion_mask"][n].bool()
        assert torch.equal(other["input_ids"][n][mixed], batch["input_ids"][n - 1][before])
        start = int(mine.nonzero()[0])
        assert torch.equal(other["input_ids"][n][:start], batch["input_ids"][n][:start])

    job, trainer = prepared(config(base, tmp_path / "orpo", "orpo", **{"optim.beta": 0.3}))
    moved(job.adapter)
    batch = trainer.data_collator([{"row": 0}, {"row": 1}])
    loss = float(trainer.compute_loss(job.model, {key: value for key, value in batch.items() if key != "row"}))
    job.model.eval()
    means, nll = [], None
    for kind in ("chosen", "rejected"):
        part = {key: batch[f"{kind}_{key}"] for key in ("input_ids", "attention_mask")}
        part["completion_mask"] = (batch[f"{kind}_labels"] != -100).long()
        means.append(log_probabilities(job.model, part) / part["completion_mask"].sum(1))
        if kind == "chosen":
            whole = {**part, "completion_mask": part["attention_mask"]}
            nll = -log_probabilities(job.model, whole).sum() / (part["attention_mask"].sum() - 2)
    odds = [mean - torch.log1p(-mean.exp()) for mean in means]
    expected = nll - 0.3 * logsigmoid(odds[0] - odds[1]).mean()
    assert loss == pytest.approx(float(expected), abs=1e-4)


def test_two_processes_train_what_one_does(base: str, tmp_path: Path) -> None:
    """Two processes with 2 pairs each, and one with 4: DPO's loss is the mean over the pairs of a step.

    Both processes compare evaluations by what the first one measures.
    """
    written(tmp_path / "twelve.jsonl", rows(12))
    more = ["--data.train", tmp_path / "twelve.jsonl", "--optim.max_grad_norm", 0]
    more += ["--run.best", "--run.metric", "reward_accuracy"]
    two, one = tmp_path / "two", tmp_path / "one"
    (code, _, err), (other, *silent) = two_processes(
        lambda: sys.exit(train(base, two, "dpo", *more, "--batch_size", 2)), tmp_path / "log"
    )
    assert (code, other) == (0, 0), err
    assert silent == ["", ""]
    assert train(base, one, "dpo", *more) == 0
    for own, alone in zip(history(two), history(one), strict=True):
        for key in ("loss", "rewards/margins", "rewards/accuracies"):
            assert own[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-5), (key, own["step"])
    for own, alone in zip(history(two, "eval_loss"), history(one, "eval_loss"), strict=True):
        assert own["eval_reward_accuracy"] == alone["eval_reward_accuracy"]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_rows_are_held_out(base: str, tmp_path: Path, objective: str) -> None:
    """Without data.valid, a share of the rows, which the seed chooses."""
    more = {"data.valid": None, "data.holdout": 0.3}
    job = prepare(config(base, tmp_path / "out", objective, **more))
    kept, out = set(job.train.sources), set(job.valid.sources)
    assert (len(kept), len(out), kept & out) == (10, 4, set())
