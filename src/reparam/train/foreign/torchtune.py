"""The configuration of torchtune's recipes for LoRA, full fine-tuning and DPO (`tune run --config`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from reparam.train.foreign.rules import EMPTY, SPEED, Given, Tool, dataset, each, sources
from reparam.train.switches import truth

_MODULES = {"output_proj": "o_proj"}  # torchtune's names of modules, where transformers has others
_MLP = ("gate_proj", "up_proj", "down_proj")
_OPTIMIZERS = {
    "torch.optim.AdamW": "adamw_torch",
    "bitsandbytes.optim.AdamW8bit": "adamw_8bit",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
}
_PLAIN = {"betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": False}  # arguments of AdamW with torch's own values
_LOSSES = ("CEWithChunkedOutputLoss", "LinearCrossEntropyLoss", "CrossEntropyLoss")
_ON_THE_HUB = {"alpaca_dataset": "tatsu-lab/alpaca", "alpaca_cleaned_dataset": "yahma/alpaca-cleaned"}
_READ = ("instruct_dataset", "chat_dataset", "text_completion_dataset", "preference_dataset")
_STYLES = ("sharegpt", "openai")
_LOGGERS = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "CometLogger": "comet_ml"}
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def _special(given: Given) -> None:
    _model(given)
    _data(given)
    _optimizer(given)
    _loss(given)
    _length(given)
    checkpointer = _part(given, "checkpointer")
    _put(given, "base.path", checkpointer.pop("checkpoint_dir", None))
    for key in ("recipe_checkpoint", "adapter_checkpoint"):
        if checkpointer.pop(key, None) not in EMPTY:
            given.refuse(f"checkpointer.{key}", "it is a checkpoint of torchtune, which is not read")
    if _name(checkpointer) not in ("FullModelHFCheckpointer", ""):
        given.refuse("checkpointer._component_", "the base is a folder or a name that transformers reads")
    _noted(given, "checkpointer", checkpointer, "the base's folder says it, and results are in run.output")
    if truth(given.take("resume_from_checkpoint")):
        given.refuse("resume_from_checkpoint", "checkpoints of torchtune are not read; delete the key to begin anew")
    logger = _part(given, "metric_logger")
    _put(given, "run.loggers", _LOGGERS.get(_name(logger)))
    _put(given, "run.name", logger.pop("name", None))
    _noted(given, "metric_logger", logger, "set it with the logger's own environment variable, such as WANDB_PROJECT")
    if (dtype := given.take("dtype")) is not None:
        if dtype not in _DTYPES:
            given.refuse(f"dtype: {dtype}", f"expected {' or '.join(_DTYPES)}")
        else:
            given.put("base.dtype", _DTYPES[dtype])
            given.put("run.precision", _DTYPES[dtype])
    if (norm := given.take("clip_grad_norm")) not in EMPTY:
        given.put("optim.max_grad_norm", 0 if float(norm) == float("inf") else float(norm))
    if truth(given.take("shuffle")) is False:
        given.refuse("shuffle: False", "rows are shuffled in each epoch")
    if given.values.get("seed", 0) is None:
        given.take("seed")
        given.note("seed: null", "run.seed is 0, so that the run can be repeated")
    if "data.valid" not in given.settings:
        given.note("no validation data", "5 % of the rows are held out, to check the run; see data.holdout")


def _model(given: Given) -> None:
    model = _part(given, "model")
    name = _name(model)
    kind = re.match(r"(q?lora)_", name)
    if kind is None:
        given.put("method.name", "full")
    elif truth(model.pop("use_dora", False)):
        given.put("method.name", "dora")
    if (kind is not None and kind[1] == "qlora") or truth(model.pop("quantize_base", False)):
        given.put("base.storage", "nf4")
    modules = [_MODULES.get(module, module) for module in model.pop("lora_attn_modules", [])]
    modules += _MLP if truth(model.pop("apply_lora_to_mlp", False)) else ()
    modules += ["lm_head"] if truth(model.pop("apply_lora_to_output", False)) else []
    _put(given, "adapter.targets", ",".join(modules) or None)
    for key, target in (("lora_rank", "r"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout")):
        _put(given, f"method.{target}", model.pop(key, None))
    _rest(given, "model", model)


def _data(given: Given) -> None:
    entries = given.take("dataset")
    for key, target, values in (("dataset", "data.train", entries), ("dataset_val", "data.valid", None)):
        values = given.take(key) if values is None else values
        if values not in EMPTY:
            sources(given, target, values, partial(_source, given, key))


def _source(given: Given, key: str, entry: Any) -> str | None:
    """The value of data.train for a data set."""
    if not isinstance(entry, Mapping):
        given.refuse(key, "expected a data set with _component_")
        return None
    left = dict(entry)
    name = _name(left)
    left.pop("_component_", None)
    path = left.pop("source", None) or _ON_THE_HUB.get(name)
    if name not in (*_ON_THE_HUB, *_READ):
        known = ", ".join((*_ON_THE_HUB, *_READ))
        given.refuse(f"{key}._component_", f"{name}: expected one of {known}; give the rows with --data.train")
        return None
    if truth(left.pop("packed", False)) and key == "dataset":
        given.put("data.packing", True)
    if truth(left.pop("train_on_input", name in _ON_THE_HUB)):
        given.put("data.loss_on", "all")
    columns = dict(left.pop("column_map", None) or {})
    if (held := left.pop("conversation_column", None)) not in (*EMPTY, "messages", "conversations"):
        columns["messages"] = held
    if (held := left.pop("column", None)) not in (*EMPTY, "text"):
        columns["text"] = held
    wanted = [f"{_PARTS.get(name, {}).get(part, part)}={held}" for part, held in columns.items()]
    _put(given, "data.columns", ",".join(wanted) or None)
    if (style := left.pop("conversation_style", None)) not in (*EMPTY, *_STYLES):
        given.refuse(f"{key}.conversation_style", f"{style}: expected {' or '.join(_STYLES)}")
    _put(given, "data.system", left.pop("new_system_prompt", None))
    split, files, subset = (left.pop(part, None) for part in ("split", "data_files", "name"))
    left.pop("split_across_pack", None)
    _rest(given, key, left)
    return dataset(given, key, path, split=split, subset=subset, files=files)


_PARTS = {"instruct_dataset": {"input": "prompt", "output": "completion"}}


def _optimizer(given: Given) -> None:
    optimizer, schedule = _part(given, "optimizer"), _part(given, "lr_scheduler")
    name = str(optimizer.pop("_component_", ""))
    if name not in _OPTIMIZERS:
        given.refuse("optimizer._component_", f"{name}: expected one of {', '.join(_OPTIMIZERS)}")
    given.put("optim.name", _OPTIMIZERS.get(name, "adamw_torch"))
    _put(given, "optim.learning_rate", optimizer.pop("lr", None))
    given.put("optim.weight_decay", optimizer.pop("weight_decay", 0.01))  # AdamW's own default
    for key in ("fused", "foreach"):
        optimizer.pop(key, None)
    _rest(given, "optimizer", {key: value for key, value in optimizer.items() if value != _PLAIN.get(key)})
    name = _name(schedule)
    if schedule and name != "get_cosine_schedule_with_warmup":
        given.refuse("lr_scheduler._component_", f"{name}: expected get_cosine_schedule_with_warmup")
    given.put("optim.schedule", "cosine" if schedule else "constant")
    given.put("optim.warmup", schedule.pop("num_warmup_steps", 0))
    if schedule.get("num_cycles") == 0.5:
        schedule.pop("num_cycles")
    _rest(given, "lr_scheduler", schedule)


def _loss(given: Given) -> None:
    loss = _part(given, "loss")
    name = _name(loss)
    if name == "DPOLoss":
        given.put("run.objective", "dpo")
        _put(given, "optim.beta", loss.pop("beta", None))
        if loss.pop("label_smoothing", 0):
            given.refuse("loss.label_smoothing", "the loss of a pair with smoothed labels has no counterpart")
    elif name not in _LOSSES:
        given.refuse("loss._component_", f"{name}: expected DPOLoss or one of {', '.join(_LOSSES)}")
    for key in ("num_output_chunks", "ignore_index"):
        loss.pop(key, None)
    _rest(given, "loss", loss)


def _length(given: Given) -> None:
    tokenizer = _part(given, "tokenizer")
    longest = tokenizer.pop("max_seq_len", None)
    _put(given, "data.max_length", longest)
    if longest is None:
        given.note("tokenizer.max_seq_len: null", "set data.max_length to the length of the longest row")
    if tokenizer.pop("prompt_template", None) not in EMPTY:
        given.refuse("tokenizer.prompt_template", "set data.chat_template, or write the rows as they are to be read")
    _noted(given, "tokenizer", tokenizer, "that of the base's folder is used")
    steps, epochs = given.take("max_steps_per_epoch"), given.values.get("epochs") or 1
    if steps:
        given.put("run.max_steps", int(steps) * int(epochs))
        given.note("max_steps_per_epoch", f"the run has {epochs} times as many steps, over whole epochs of the rows")


def _part(given: Given, key: str) -> dict[str, Any]:
    """The settings of a part, of which the recipe makes an object."""
    found = given.take(key) or {}
    if not isinstance(found, Mapping):
        raise TypeError(f"{key} is no part with _component_")
    return dict(found)


def _name(part: Mapping[str, Any]) -> str:
    """The name of the class or function, without its module."""
    return str(part.get("_component_", "")).rpartition(".")[2]


def _put(given: Given, key: str, value: Any) -> None:
    if value is not None:
        given.put(key, value)


def _noted(given: Given, key: str, part: Mapping[str, Any], text: str) -> None:
    """Note what is left of a part that does not change the adapter."""
    if names := [name for name, value in part.items() if name != "_component_" and value not in EMPTY]:
        given.note(f"{key}: {', '.join(names)}", text)


def _rest(given: Given, key: str, part: Mapping[str, Any]) -> None:
    """Refuse what is left of a part and is not empty."""
    for name, value in part.items():
        if name != "_component_" and value not in (*EMPTY, [], {}):
            given.refuse(f"{key}.{name}", "it has no counterpart; delete it to train without it")


TORCHTUNE = Tool(
    name="torchtune",
    own=(
        *("model", "tokenizer", "checkpointer", "dataset", "loss", "optimizer", "lr_scheduler", "metric_logger"),
        *("epochs", "max_steps_per_epoch", "log_every_n_steps", "enable_activation_checkpointing", "profiler"),
        *("enable_activation_offloading", "log_peak_memory_stats", "save_adapter_weights_only"),
    ),
    special=_special,
    renamed={
        "epochs": "run.epochs",
        "batch_size": "run.batch_size",
        "gradient_accumulation_steps": "run.accumulation",
        "enable_activation_checkpointing": "run.gradient_checkpointing",
        "log_every_n_steps": "run.log_every",
        "output_dir": "run.output",
    },
    notes={
        **each(SPEED, "enable_activation_offloading activation_offloading_use_streams compile optimizer_in_bwd"),
        **each(
            SPEED, "log_peak_memory_stats profiler custom_sharded_layers fsdp_cpu_offload fsdp_reshard_after_forward"
        ),
        **each(
            SPEED, "ac_mode ac_option use_clusters tensor_parallel_dim data_parallel_dim memory_efficient_fsdp_wrap"
        ),
        **each("only the adapter is saved", "save_adapter_weights_only keep_last_n_checkpoints save_last_epoch_only"),
        "device": "the accelerator is used if there is one",
        "log_level": "reparam's own output is in the folder of the run",
        "run_val_every_n_steps": "it is a tenth of the run; set run.eval_every to a number of steps",
    },
    refused={},
    defaults={"run.accumulation": 1, "method.r": 8, "method.alpha": 16, "method.dropout": 0, "optim.max_grad_norm": 0},
)
