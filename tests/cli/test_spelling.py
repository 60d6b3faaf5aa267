"""Options as people type them who know the scripts of transformers, TRL, LLaMA-Factory and Axolotl."""

from __future__ import annotations

import collections
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
from command import reparam

from reparam.cli.config_options import ALIASES
from reparam.train.switches import SWITCHES

NEEDED = ("--base.path", "model", "--data.train", "rows.jsonl")


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `reparam train` up to the resolved configuration; returns its tables, or the exit code."""
    from reparam.train import run
    from reparam.train.config import dump

    held: list[Any] = []

    def kept(config: Any, **settings: Any) -> Any:
        held.append(tomllib.loads(dump(config)))
        raise RuntimeError("resolved")

    monkeypatch.setattr(run, "train", kept)

    def call(*arguments: str) -> Any:
        held.clear()
        code = reparam("train", *NEEDED, *arguments)
        return held[0] if held else code

    return call


@pytest.mark.parametrize(
    ("typed", "section", "key", "value"),
    [
        ("--bf16", "run", "precision", "bfloat16"),
        ("--bf16 True", "run", "precision", "bfloat16"),
        ("--bf16=yes", "run", "precision", "bfloat16"),
        ("--bf16 False", "run", "precision", "float32"),
        ("--fp16 False", "run", "precision", "float32"),
        ("--load_in_4bit", "base", "storage", "nf4"),
        ("--load-in-4bit true", "base", "storage", "nf4"),
        ("--load_in_8bit True", "base", "storage", "int8"),
        ("--load_in_4bit False", "base", "storage", "dense"),
        ("--quantization_bit 4", "base", "storage", "nf4"),
        ("--use_dora", "method", "name", "dora"),
        ("--use_rslora True", "method", "scaling", "rslora"),
        ("--finetuning_type full", "method", "name", "full"),
        ("--finetuning_type lora", "method", "name", "lora"),
        ("--use_peft", "method", "name", "lora"),
        ("--lora_rank 3", "method", "r", 3),
        ("--lora-r 3", "method", "r", 3),
        ("--lora_target q_proj,v_proj", "adapter", "targets", ["q_proj", "v_proj"]),
        ("--lora_target_modules q_proj v_proj k_proj", "adapter", "targets", ["q_proj", "v_proj", "k_proj"]),
        ("--gradient_checkpointing", "run", "gradient_checkpointing", True),
        ("--gradient_checkpointing True", "run", "gradient_checkpointing", True),
        ("--gradient_checkpointing=false", "run", "gradient_checkpointing", False),
        ("--gradient-checkpointing no", "run", "gradient_checkpointing", False),
        ("--no-run.resume True", "run", "resume", False),
        ("--no-run.resume False", "run", "resume", True),
        ("--bnb_4bit_use_double_quant False --load_in_4bit", "base", "double", False),
        ("--cutoff_len 77", "data", "max_length", 77),
        ("--sequence_len 77", "data", "max_length", 77),
        ("--micro_batch_size 5", "run", "batch_size", 5),
        ("--num_epochs 2", "run", "epochs", 2.0),
        ("--val_size 0.2", "data", "holdout", 0.2),
        ("--optimizer adamw_torch --lr_scheduler linear", "optim", "schedule", "linear"),
        ("--report_to tensorboard wandb", "run", "loggers", ["tensorboard", "wandb"]),
        ("--max_steps -1", "run", "max_steps", -1),
        ("--train_on_inputs true", "data", "loss_on", "all"),
        ("--assistant_only_loss", "data", "loss_on", "answers"),
        ("--stage sft --do_train True --lora_rank 5", "method", "r", 5),
        ("--resume_from_checkpoint False", "run", "resume", False),
        ("--model_name m --r 5 --lora_alpha 9 --bias none --use_loftq False", "method", "r", 5),
        ("--use_gradient_checkpointing unsloth --random_state 3407", "run", "gradient_checkpointing", True),
        ("--use_gradient_checkpointing unsloth --random_state 3407", "run", "seed", 3407),
        ("--bias lora_only", "adapter", "bias", True),
    ],
)
def test_it_means_what_it_means_there(typed: str, section: str, key: str, value: object, resolved: Any) -> None:
    assert resolved(*typed.split())[section][key] == value


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("--fp16", "fp16: 'true': expected false; float16 needs a scaled loss"),
        ("--quantization_bit 3", "quantization_bit: '3': expected 4 or 8"),
        (
            "--bf16 --run.precision float32",
            "another option sets it to float32",
        ),
        ("--load_in_4bit --load_in_8bit", "load_in_4bit sets base.storage to nf4, and load_in_8bit sets it to int8"),
        ("--resume_from_checkpoint out/checkpoint-5", "give that folder as run.output"),
        ("--lora_rr 3", "No such option: --lora_rr (Possible options: --lora_r,"),
        ("--deepspeed ds.json", "--deepspeed has no counterpart: torchrun gives each device a process"),
        ("--trust-remote-code True", "has no counterpart: reparam never runs code from a model's folder"),
        ("--gradient_checkpointing maybe", "unexpected extra argument"),
        ("--lora_r 3 4", "'3,4'"),
        ("--lora_r", "requires an argument"),
        ("--bias all", "bias: 'all': expected none or lora_only; adapter.bias trains the biases"),
        ("--quantization_bit", "requires an argument"),
    ],
)
def test_a_mistake_gets_one_sentence(
    typed: str, sentence: str, resolved: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolved(*typed.split()) == 2
    told = capsys.readouterr().err
    assert sentence in " ".join(told.split())
    assert "Traceback" not in told


@pytest.mark.parametrize("verb", ["train", "compare", "intrinsic"])
def test_every_name_is_that_of_one_option(verb: str) -> None:
    from reparam.cli import app

    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    names = collections.Counter(name for p in command.params for name in [*p.opts, *p.secondary_opts])
    assert [name for name, count in names.items() if count > 1] == []
    known = {name.replace("-", "_").strip("_") for names in ALIASES.values() for name in names}
    assert known & set(SWITCHES) == set()


def test_a_positional_argument_stays_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "missing.toml"
    for typed in (["--bf16"], ["--gradient_checkpointing"], ["--gradient_checkpointing", "False"], ["--lora_r", "2"]):
        assert reparam("compare", *typed, plan) == 2
        assert f"{plan}: no such file" in capsys.readouterr().err


def test_help_all_explains_the_switches(capsys: pytest.CaptureFixture[str]) -> None:
    assert reparam("train", "--help-all") == 0
    told = capsys.readouterr().out
    assert all(f"--{name}\n" in "\n".join(line.rstrip() for line in told.splitlines()) for name in SWITCHES)
    assert "true: base.storage nf4; false: the default" in " ".join(told.split())
