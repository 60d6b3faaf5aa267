"""torchtune's configurations as settings of reparam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from reparam import ConfigError
from reparam.cli.config_options import ALIASES
from reparam.train.config import Config, resolve
from reparam.train.foreign.convert import Converted, convert

NAMES = {name.lstrip("-"): key for key, aliases in ALIASES.items() for name in aliases}
KEYS: dict[str, Any] = {
    "output_dir": "out/tune",
    "model": {
        "_component_": "torchtune.models.qwen2_5.lora_qwen2_5_0_5b",
        **{"lora_attn_modules": ["q_proj", "output_proj"], "apply_lora_to_mlp": True, "apply_lora_to_output": False},
        **{"lora_rank": 32, "lora_alpha": 64, "lora_dropout": 0.1},
    },
    "tokenizer": {
        "_component_": "torchtune.models.qwen2_5.qwen2_5_tokenizer",
        **{"path": "base/vocab.json", "max_seq_len": 512},
    },
    "checkpointer": {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        **{"checkpoint_dir": "base", "checkpoint_files": ["model.safetensors"], "model_type": "QWEN2"},
        **{"output_dir": "${output_dir}", "recipe_checkpoint": None},
    },
    "resume_from_checkpoint": False,
    "dataset": {"_component_": "torchtune.datasets.chat_dataset", "source": "json", "data_files": "rows.json"},
    "seed": 3,
    "shuffle": True,
    "batch_size": 2,
    "epochs": 2,
    "max_steps_per_epoch": None,
    "gradient_accumulation_steps": 8,
    "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.05, "lr": 2e-3},
    "lr_scheduler": {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
        "num_warmup_steps": 7,
    },
    "loss": {"_component_": "torchtune.modules.loss.LinearCrossEntropyLoss"},
    "clip_grad_norm": None,
    "compile": False,
    "device": "cuda",
    "dtype": "bf16",
    "enable_activation_checkpointing": True,
    "metric_logger": {"_component_": "torchtune.training.metric_logging.WandBLogger", "project": "tune"},
    "log_every_n_steps": 5,
    "profiler": {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False},
}
DPO = {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.3}
PAIRS = {"_component_": "torchtune.datasets.preference_dataset", "source": "json", "data_files": "pairs.json"}
ALPACA = {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "packed": True}
INSTRUCT = {"_component_": "x.instruct_dataset", "source": "org/rows", "split": "train", "column_map": {"input": "q"}}


def read(folder: Path, **changes: Any) -> tuple[Converted, Config]:
    file = folder / "tune.yaml"
    file.write_text(yaml.safe_dump({**KEYS, **changes}))
    found = convert(file, NAMES)
    return found, resolve(None, found.settings)


def model(**changes: Any) -> dict[str, Any]:
    return {"model": {**KEYS["model"], **changes}}


def test_every_setting_is_read(tmp_path: Path) -> None:
    found, config = read(tmp_path)
    assert found.tool == "torchtune"
    assert (config.base.path, config.base.dtype, config.base.storage) == ("base", "bfloat16", "dense")
    assert config.adapter.targets == ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    settings = config.method.settings()
    assert (config.method.name, settings["r"], settings["alpha"], settings["dropout"]) == ("lora", 32, 64, 0.1)
    assert (config.data.sources(), config.data.max_length, config.data.loss_on) == (("rows.json",), 512, "answers")
    optim, run = config.optim, config.run
    assert (optim.name, optim.learning_rate, optim.weight_decay) == ("adamw_torch", 2e-3, 0.05)
    assert (optim.schedule, optim.warmup, optim.max_grad_norm) == ("cosine", 7, 0)
    assert (run.batch_size, run.epochs, run.accumulation, run.seed) == (2, 2, 8, 3)
    assert (run.output, run.log_every, run.loggers) == ("out/tune", 5, ("wandb",))
    assert (run.precision, run.gradient_checkpointing) == ("bfloat16", True)
    told = "\n".join(found.notes)
    for key in ("checkpoint_files", "tokenizer: path", "metric_logger: project", "device", "profiler", "held out"):
        assert key in told


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        (model(_component_="torchtune.models.llama3_2.qlora_llama3_2_1b"), "base.storage", "nf4"),
        (model(quantize_base=True), "base.storage", "nf4"),
        (model(use_dora=True), "method.name", "dora"),
        ({"model": {"_component_": "torchtune.models.llama2.llama2_7b"}}, "method.name", "full"),
        ({"optimizer": {"_component_": "bitsandbytes.optim.PagedAdamW8bit"}}, "optim.name", "paged_adamw_8bit"),
        ({"optimizer": {"_component_": "torch.optim.AdamW"}}, "optim.weight_decay", 0.01),
        ({"lr_scheduler": None}, "optim.schedule", "constant"),
        ({"dataset": ALPACA}, "data.train", "yahma/alpaca-cleaned"),
        ({"dataset": ALPACA}, "data.loss_on", "all"),
        ({"dataset": ALPACA}, "data.packing", True),
        ({"dataset": INSTRUCT}, "data.columns", ("prompt=q",)),
        ({"dataset": [ALPACA, INSTRUCT]}, "data.train", "yahma/alpaca-cleaned,org/rows"),
        ({"dataset_val": {**INSTRUCT, "split": "test"}}, "data.valid", "org/rows:test"),
        ({"loss": DPO, "dataset": PAIRS}, "run.objective", "dpo"),
        ({"loss": DPO, "dataset": PAIRS}, "optim.beta", 0.3),
        ({"max_steps_per_epoch": 50}, "run.max_steps", 100),
        ({"clip_grad_norm": 1.0}, "optim.max_grad_norm", 1.0),
        ({"clip_grad_norm": "inf"}, "optim.max_grad_norm", 0),
    ],
)
def test_a_setting(changes: dict[str, Any], key: str, value: Any, tmp_path: Path) -> None:
    _, config = read(tmp_path, **changes)
    section, _, name = key.partition(".")
    assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (model(lora_what=1), "model.lora_what: it has no counterpart"),
        ({"dataset": {"_component_": "x.slimorca_dataset"}}, "slimorca_dataset: expected one of alpaca_dataset"),
        ({"dataset": {**ALPACA, "filter_fn": "f"}}, "dataset.filter_fn"),
        ({"optimizer": {"_component_": "torch.optim.SGD", "lr": 1}}, "torch.optim.SGD: expected one of"),
        ({"optimizer": {"_component_": "torch.optim.AdamW", "betas": [0.9, 0.95]}}, "optimizer.betas"),
        ({"lr_scheduler": {"_component_": "x.get_rex", "num_warmup_steps": 1}}, "get_rex: expected get_cosine"),
        ({"loss": {"_component_": "torchtune.rlhf.loss.SimPOLoss"}}, "SimPOLoss: expected DPOLoss or one of"),
        ({"tokenizer": {"prompt_template": "x.T"}}, "tokenizer.prompt_template"),
        ({"shuffle": False}, "shuffle: False"),
        ({"dtype": "fp16"}, "dtype: fp16: expected bf16 or fp32"),
        ({"resume_from_checkpoint": True}, "resume_from_checkpoint: checkpoints of torchtune are not read"),
        ({"kd_ratio": 0.5}, "kd_ratio: it is unknown"),
        ({"model": 5}, "a value has another form than in torchtune"),
    ],
)
def test_what_has_no_counterpart_is_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        read(tmp_path, **changes)
    assert sentence in str(told.value)
