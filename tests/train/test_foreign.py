"""Configurations of LLaMA-Factory, Axolotl and TRL: what they mean there is what is trained here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import reparam
from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig
from trl.scripts.utils import TrlParser

from reparam.cli.config_options import ALIASES
from reparam.errors import ConfigError
from reparam.train.config import Config, resolve
from reparam.train.foreign.convert import TOOLS, Converted, convert
from reparam.train.foreign.rules import ARGUMENT_NOTES, ARGUMENT_REFUSED

NAMES = {name.lstrip("-"): key for key, names in ALIASES.items() for name in names}

LLAMA_FACTORY = """
model_name_or_path: ./model
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
dataset: names
dataset_dir: DIR
template: llama3
cutoff_len: 512
max_samples: 30
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: out
logging_steps: 5
save_steps: 50
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.2
eval_strategy: steps
eval_steps: 25
quantization_bit: 4
quantization_method: bitsandbytes
"""

AXOLOTL = """
base_model: ./model
model_type: LlamaForCausalLM
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: rows.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
dataset_prepared_path:
val_set_size: 0.1
output_dir: ./out
adapter: qlora
lora_model_dir:
sequence_len: 256
sample_packing: false
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: linear
learning_rate: 2e-4
bf16: true
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.01
special_tokens: {pad_token: <pad>}
"""

TRL = """
model_name_or_path: ./model
model_revision: v1
dtype: bfloat16
attn_implementation: flash_attention_2
dataset_name: org/rows
dataset_train_split: train_sft
use_peft: true
lora_r: 12
lora_alpha: 24
lora_target_modules: [q_proj, k_proj]
lora_modules_to_save: [lm_head]
use_rslora: true
load_in_4bit: true
max_length: 300
assistant_only_loss: true
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
bf16: true
output_dir: out
per_device_train_batch_size: 3
gradient_accumulation_steps: 5
max_grad_norm: 0.5
weight_decay: 0.1
logging_steps: 7
eval_strategy: "no"
save_strategy: steps
save_steps: 40
save_total_limit: 3
report_to: [tensorboard]
run_name: first
seed: 9
"""


def read(text: str, folder: Path) -> tuple[Converted, Config]:
    file = folder / "foreign.yaml"
    file.write_text(text)
    found = convert(file, NAMES)
    return found, resolve(None, found.settings)


def listed(found: Converted) -> set[str]:
    return {note.removeprefix("no counterpart: ").split(" (")[0].split(":")[0] for note in found.notes}


def test_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"names": {"file_name": "names.json", "columns": {"prompt": "question", "response": "answer"}}})
    )
    found, config = read(LLAMA_FACTORY.replace("DIR", str(tmp_path)), tmp_path)
    assert found.tool == "LLaMA-Factory"
    assert (config.base.path, config.base.storage) == ("./model", "nf4")
    assert (config.data.train, config.data.max_rows) == (str(tmp_path / "names.json"), (30,))
    assert config.data.renamed() == {"instruction": "question", "output": "answer"}
    assert (config.data.max_length, config.data.holdout, config.data.loss_on) == (512, 0.2, "answers")
    assert config.adapter.targets == ("q_proj", "v_proj")
    assert config.method.settings()["r"] == 4
    assert config.method.settings()["alpha"] == 8  # twice the rank
    assert (config.optim.learning_rate, config.optim.schedule, config.optim.warmup) == (1e-4, "cosine", 0.1)
    run = config.run
    assert (run.output, run.epochs, run.batch_size, run.accumulation, run.seed) == ("out", 2, 2, 4, 42)
    assert (run.eval_every, run.save_every, run.log_every, run.fresh) == (25, 50, 5, True)
    assert run.precision == "bfloat16"
    ignored = {"trust_remote_code", "template", "overwrite_cache", "preprocessing_num_workers", "plot_loss"}
    assert listed(found) == {*ignored, "ddp_timeout"}


def test_axolotl(tmp_path: Path) -> None:
    found, config = read(AXOLOTL, tmp_path)
    assert found.tool == "Axolotl"
    assert (config.base.path, config.base.storage) == ("./model", "nf4")
    assert (config.data.train, config.data.max_length, config.data.holdout) == ("rows.jsonl", 256, 0.1)
    assert config.adapter.targets == ("all-linear",)
    settings = config.method.settings()
    assert (config.method.name, settings["r"], settings["alpha"], settings["dropout"]) == ("lora", 32, 16, 0.05)
    optim = config.optim
    assert (optim.name, optim.schedule, optim.learning_rate) == ("adamw_8bit", "linear", 2e-4)
    assert (optim.warmup, optim.weight_decay) == (10, 0.01)
    run = config.run
    assert (run.output, run.epochs, run.batch_size, run.accumulation) == ("./out", 4, 2, 4)
    assert (run.precision, run.gradient_checkpointing, run.log_every) == ("bfloat16", True, 1)
    ignored = {"model_type", "pad_to_sequence_len", "flash_attention", "special_tokens"}
    assert listed(found) == {*ignored, "evals_per_epoch", "saves_per_epoch"}


def test_trl_means_what_its_own_parser_reads(tmp_path: Path) -> None:
    found, config = read(TRL, tmp_path)
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    text = TRL.replace("report_to: [tensorboard]", "report_to: none\nuse_cpu: true")
    (tmp_path / "theirs.yaml").write_text(text.replace("output_dir: out", f"output_dir: {tmp_path / 'out'}"))
    script, theirs, model = parser.parse_args_and_config(["--config", str(tmp_path / "theirs.yaml")])
    assert found.tool == "TRL"
    assert config.data.train == f"{script.dataset_name}:{script.dataset_train_split}"
    assert (config.base.path, config.base.revision) == (model.model_name_or_path, model.model_revision)
    assert (config.base.storage, config.base.dtype) == ("nf4", model.dtype)
    settings = config.method.settings()
    assert (settings["r"], settings["alpha"], settings["dropout"]) == (
        model.lora_r,
        model.lora_alpha,
        model.lora_dropout,
    )
    assert settings["scaling"] == "rslora"
    assert list(config.adapter.targets or ()) == model.lora_target_modules
    assert list(config.adapter.modules_to_save) == model.lora_modules_to_save
    assert (config.data.max_length, config.data.loss_on) == (theirs.max_length, "answers")
    optim, run = config.optim, config.run
    assert (optim.learning_rate, optim.schedule) == (theirs.learning_rate, theirs.lr_scheduler_type)
    assert (optim.warmup, optim.weight_decay, optim.max_grad_norm) == (0, theirs.weight_decay, theirs.max_grad_norm)
    assert (run.epochs, run.batch_size) == (theirs.num_train_epochs, theirs.per_device_train_batch_size)
    assert (run.accumulation, run.save_every, run.keep) == (theirs.gradient_accumulation_steps, theirs.save_steps, 3)
    assert (run.loggers, run.name, run.seed) == (("tensorboard",), "first", theirs.seed)
    ignored = {"attn_implementation", "gradient_checkpointing_kwargs", "eval_strategy"}
    assert listed(found) == ignored


MINIMAL = {
    "LLaMA-Factory": {"stage": "sft", "finetuning_type": "lora", "model_name_or_path": "m"},
    "Axolotl": {"base_model": "m", "adapter": "lora", "sequence_len": 10, "micro_batch_size": 1},
    "TRL": {"model_name_or_path": "m", "use_peft": True, "dataset_name": "rows.jsonl"},
}


PACKING = {"LLaMA-Factory": "neat_packing", "Axolotl": "sample_packing", "TRL": "packing"}


@pytest.mark.parametrize("tool", MINIMAL)
def test_what_training_offers_is_read(tool: str, tmp_path: Path) -> None:
    keys = {
        PACKING[tool]: True,
        "neftune_noise_alpha": 5,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "label_smoothing_factor": 0.1,
    }
    _, config = read(yaml.safe_dump({**MINIMAL[tool], **keys}), tmp_path)
    assert config.data.packing
    assert (config.optim.neftune, config.optim.label_smoothing) == (5, 0.1)
    assert config.run.best
    assert config.run.metric == "loss"


@pytest.mark.parametrize("tool", MINIMAL)
@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"learning_rat": 1}, "learning_rat: it is unknown (did you mean 'learning_rate'"),
        ({"fp16": True}, "fp16: True: expected false; float16 needs a scaled loss"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last: the last batch of an epoch is trained on"),
        ({"adam_beta2": 0.95}, "adam_beta2: the optimizer has torch's own value"),
        ({"datasets": 5}, "datasets"),
        ({"plugins": ["some.Code"]}, "plugins"),
    ],
)
def test_what_changes_the_adapter_and_has_no_counterpart_is_refused(
    tool: str, keys: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as told:
        read(yaml.safe_dump({**MINIMAL[tool], **keys}), tmp_path)
    assert sentence in str(told.value)
    assert f"foreign.yaml ({tool}): " in str(told.value)


@pytest.mark.parametrize(
    ("tool", "keys", "sentence"),
    [
        ("LLaMA-Factory", {"stage": "rm"}, "stage: 'rm': expected sft or dpo or kto; reward models"),
        ("LLaMA-Factory", {"stage": "dpo", "pref_loss": "simpo"}, "pref_loss: simpo: expected orpo, sigmoid"),
        ("LLaMA-Factory", {"stage": "dpo", "pref_ftx": 0.1}, "pref_ftx: a supervised loss beside"),
        ("LLaMA-Factory", {"use_galore": True}, "use_galore: it is another method"),
        ("LLaMA-Factory", {"finetuning_type": "freeze"}, "expected lora or full"),
        ("LLaMA-Factory", {"mix_strategy": "interleave_over"}, "set interleave_probs, too"),
        (
            "LLaMA-Factory",
            {"dataset": "a", "dataset_dir": "nowhere"},
            "nowhere/dataset_info.json, which does not",
        ),
        ("LLaMA-Factory", {"lora_rank": "many"}, "a value has another form"),
        ("LLaMA-Factory", {"quantization_bit": 3}, "expected 4 or 8"),
        ("Axolotl", {"rl": "grpo"}, "rl: 'grpo': expected dpo or orpo or kto or ipo"),
        ("Axolotl", {"prefer.reward": "a.py:f"}, "it names code to run"),
        ("TRL", {"reward": "a.py:f"}, "it names code to run"),
        ("Axolotl", {"adapter": "oft"}, "adapter: oft: expected lora or qlora"),
        ("Axolotl", {"datasets": [{"path": "a", "type": {"field_instruction": "q"}}]}, "a prompt of its own"),
        ("Axolotl", {"datasets": [{"path": "a", "shards": 3}]}, "datasets.shards"),
        ("Axolotl", {"val_set_size": 200}, "val_set_size: a number of rows"),
        ("Axolotl", {"lora_target_linear": True, "lora_target_modules": ["q_proj"]}, "delete one of the two"),
        ("TRL", {"dataset_config": "sub"}, "dataset_name: the subset 'sub'"),
        ("TRL", {"loss_type": "dft"}, "loss_type"),
        ("TRL", {"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit sets it to int8"),
    ],
)
def test_a_mistake_of_one_tool_gets_one_sentence(
    tool: str, keys: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as told:
        read(yaml.safe_dump({**MINIMAL[tool], **keys}), tmp_path)
    assert sentence in str(told.value)


def test_a_data_set_stays_inside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "../../etc/passwd"}, "b": {}, "c": 5}))
    for name, sentence in (
        ("a", "is outside"),
        ("b", "names no data set"),
        ("c", "has no 'c'"),
        ("bb", "did you mean"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            read(yaml.safe_dump({"stage": "sft", "dataset": name, "dataset_dir": str(tmp_path)}), tmp_path)


def test_several_data_sets_are_several_sources(tmp_path: Path) -> None:
    info = {"a": {"file_name": "a.json"}, "b": {"hf_hub_url": "org/b", "split": "test"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    mixed = {"mix_strategy": "interleave_over", "interleave_probs": "0.7,0.3"}
    theirs = {"stage": "sft", "dataset": "a, b", "dataset_dir": str(tmp_path), **mixed}
    _, config = read(yaml.safe_dump(theirs), tmp_path)
    assert config.data.sources() == (str(tmp_path / "a.json"), "org/b:test")
    assert (config.data.weights, config.data.mix) == ((0.7, 0.3), "over")
    entries = [{"path": "a.jsonl"}, {"path": "org/b", "split": "test"}]
    for tool in ("Axolotl", "TRL"):
        keys = {key: value for key, value in MINIMAL[tool].items() if key != "dataset_name"}
        _, config = read(yaml.safe_dump({**keys, "datasets": entries}), tmp_path)
        assert config.data.sources() == ("a.jsonl", "org/b:test")


def test_texts_of_llama_factory_are_packed_and_have_their_key(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"a": {"file_name": "a.json", "columns": {"prompt": "raw"}}})
    )
    keys = {"stage": "pt", "dataset": "a", "dataset_dir": str(tmp_path)}
    found, config = read(yaml.safe_dump(keys), tmp_path)
    assert (config.data.columns, config.data.packing, config.run.objective) == (("text=raw",), True, "sft")
    assert any("do not see each other" in note for note in found.notes)
    _, config = read(yaml.safe_dump({**keys, "packing": False}), tmp_path)
    assert not config.data.packing


def test_how_axolotl_ends_answers_is_noted(tmp_path: Path) -> None:
    found, _ = read(yaml.safe_dump({**MINIMAL["Axolotl"], "eot_tokens": ["<end_of_turn>"]}), tmp_path)
    assert any("eot_tokens (an answer ends as" in note for note in found.notes)


def test_all_weights_are_trained_without_an_adapter(tmp_path: Path) -> None:
    for tool, key in (("LLaMA-Factory", "finetuning_type"), ("Axolotl", "adapter"), ("TRL", "use_peft")):
        text = {**MINIMAL[tool], key: {"finetuning_type": "full", "adapter": None, "use_peft": False}[key]}
        _, config = read(yaml.safe_dump(text), tmp_path)
        assert (config.method.name, config.adapter.targets) == ("full", None)


def test_every_argument_of_transformers_has_one_fate() -> None:
    """Each is a setting, a note or a refusal; an argument that a new version adds fails here."""
    from reparam.train.switches import SWITCHES

    special = {"warmup_ratio", "eval_strategy", "save_strategy", "gradient_checkpointing", "activation_checkpointing"}
    known = {*NAMES, *SWITCHES, *ARGUMENT_NOTES, *ARGUMENT_REFUSED, *special}
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields - known == set()
    for tool in TOOLS:
        assert set(tool.notes) & set(tool.refused) == set(), tool.name


def test_a_file_of_no_tool(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not recognized as a configuration of LLaMA-Factory, Axolotl, TRL"):
        read("a: 1\n", tmp_path)


@pytest.mark.parametrize("tool", ["LLaMA-Factory", "Axolotl", "TRL"])
def test_the_run_is_that_of_the_same_settings(tool: str, base: str, rows: str, tmp_path: Path) -> None:
    """The adapter of `--from` has the bytes of one that is trained with reparam's own options."""
    shared = {"learning_rate": 0.05, "max_steps": 4, "output_dir": str(tmp_path / "theirs"), "seed": 3, "lora_alpha": 8}
    path = {"model_name_or_path": base}
    keys: dict[str, Any] = {
        "LLaMA-Factory": path | {"stage": "sft", "lora_rank": 4, "dataset": rows, "cutoff_len": 128},
        "Axolotl": {"base_model": base, "adapter": "lora", "lora_r": 4, "datasets": [{"path": rows, "type": "alpaca"}]}
        | {"sequence_len": 128, "lora_target_linear": True, "lr_scheduler": "linear", "micro_batch_size": 8},
        "TRL": path | {"use_peft": True, "lora_r": 4, "dataset_name": rows, "max_length": 128, "lora_dropout": 0},
    }[tool]
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(shared | keys))
    assert reparam("train", "--from", tmp_path / "theirs.yaml", "--data.score_rows", 0) == 0
    own = ["--base", base, "--data", rows, "--method.r", 4, "--method.alpha", 8, "--data.max_length", 128]
    own += ["--lr", 0.05, "--optim.schedule", "linear", "--optim.warmup", 0, "--max_steps", 4, "--seed", 3]
    assert reparam("train", *own, "--data.score_rows", 0, "-o", tmp_path / "ours") == 0
    theirs, ours = (tmp_path / name / "adapter" / "adapter.safetensors" for name in ("theirs", "ours"))
    assert theirs.read_bytes() == ours.read_bytes()


def test_options_override_the_file_and_the_notes_are_printed(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL["TRL"], "model_name_or_path": base, "dataset_name": rows, "tf32": True}))
    assert reparam("train", "--from", file, "--lora_r", 3, "--dry-run", "-o", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert f"{file} is read as a configuration of TRL" in told
    assert "no counterpart: tf32 (it changes speed or memory, not the adapter)" in told
    assert "defaults of TRL: run.epochs = 3" in told
    assert "    r = 3" in told
    assert not (tmp_path / "out").exists()
    assert reparam("train", "--from", file, "--config", file) == 2
    assert "leave one of them out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "keys", "settings"),
    [
        ("LLaMA-Factory", {"stage": "dpo", "pref_beta": 0.3}, {"run.objective": "dpo", "optim.beta": 0.3}),
        ("LLaMA-Factory", {"stage": "dpo", "pref_loss": "orpo"}, {"run.objective": "orpo"}),
        ("LLaMA-Factory", {"stage": "dpo", "pref_loss": "ipo"}, {"prefer.loss_type": "ipo"}),
        ("LLaMA-Factory", {"stage": "kto", "kto_rejected_weight": 2}, {"prefer.undesirable_weight": 2}),
        ("Axolotl", {"rl": "ipo", "dpo_beta": 0.2}, {"run.objective": "dpo", "prefer.loss_type": "ipo"}),
        ("Axolotl", {"rl": "orpo", "orpo_alpha": 0.2}, {"run.objective": "orpo", "optim.beta": 0.2}),
    ],
)
def test_preference_tuning(tool: str, keys: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    _, config = read(yaml.safe_dump({**MINIMAL[tool], **keys}), tmp_path)
    for key, value in settings.items():
        section, _, name = key.partition(".")
        assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        (AXOLOTL, "chat_template: chatml", {"chat_template": "chatml"}),
        (AXOLOTL, "chat_template: tokenizer_default", {}),
        (TRL, "chat_template_path: ./chat.jinja", {"chat_template": "./chat.jinja"}),
        (
            LLAMA_FACTORY,
            "default_system: Be kind.\nenable_thinking: false",
            {"system": "Be kind.", "thinking": False},
        ),
    ],
)
def test_how_chats_are_written(tmp_path: Path, text: str, more: str, expected: dict[str, Any]) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"names": {"file_name": "names.json"}}))
    _, config = read(f"{text.replace('DIR', str(tmp_path))}\n{more}\n", tmp_path)
    keys = ("chat_template", "system", "thinking")
    assert {key: value for key in keys if (value := getattr(config.data, key)) is not None} == expected
