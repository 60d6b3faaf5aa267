"""The configuration of TRL's `trl sft` (SFTConfig, ModelConfig, ScriptArguments)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reparam.train.foreign.rules import (
    ARGUMENT_NOTES,
    ARGUMENT_REFUSED,
    EMPTY,
    SPEED,
    Given,
    Tool,
    arguments,
    dataset,
    each,
    sources,
)
from reparam.train.switches import truth


def _special(given: Given) -> None:
    arguments(given)
    if truth(given.take("use_peft")) is not True:
        given.put("method.name", "full")
        given.note("use_peft: false", "all weights are trained, as TRL does then; add use_peft: true for LoRA")
        for key in ("lora_r", "lora_alpha", "lora_dropout"):
            given.take(key)
    name, several = given.take("dataset_name"), given.take("datasets")
    split, subset = given.take("dataset_train_split"), given.take("dataset_config")
    test = given.take("dataset_test_split")
    if several:
        sources(given, "data.train", several, lambda entry: _entry(given, entry))
    elif name is not None:
        given.put("data.train", dataset(given, "dataset_name", name, split=split, subset=subset) or name)
        if test and "eval_steps" in given.values:
            given.put("data.valid", dataset(given, "dataset_test_split", name, split=test) or name)
    field = given.take("dataset_text_field")
    if field not in (*EMPTY, "text"):
        given.put("data.columns", f"text={field}")
    if given.take("truncation_mode") == "keep_end":
        given.refuse("truncation_mode: keep_end", "long rows keep their start")
    if given.take("loss_type") not in (*EMPTY, "nll", "chunked_nll"):
        given.refuse("loss_type", "the loss is the cross entropy of the answers (nll)")
    if "max_length" in given.values and given.values["max_length"] is None:
        given.take("max_length")
        given.note("max_length: null", "set data.max_length to the length of the longest row")
    whole = given.values.get("assistant_only_loss")
    if truth(whole) is not True:
        given.take("assistant_only_loss")
        text = "the loss of chats is on the answers; --data.loss_on all puts it on all tokens, as TRL does"
        given.note("assistant_only_loss: false", text)


def _entry(given: Given, entry: Any) -> str | None:
    """The value of data.train for one entry of `datasets`."""
    if not isinstance(entry, Mapping):
        given.refuse("datasets", "expected entries with a path")
        return None
    for key in entry.keys() - {"path", "name", "split", "data_files", "columns"}:
        given.refuse(f"datasets.{key}", "has no counterpart; save the rows as a file")
    files, part, subset = entry.get("data_files"), entry.get("split"), entry.get("name")
    return dataset(given, "datasets", entry.get("path"), split=part, subset=subset, files=files)


TRL = Tool(
    name="TRL",
    own=(
        *("use_peft", "dataset_name", "dataset_train_split", "lora_target_modules", "assistant_only_loss"),
        *("completion_only_loss", "lora_task_type", "packing_strategy", "padding_free", "eos_token", "max_length"),
        *("dataset_num_proc", "use_bnb_nested_quant", "attn_implementation", "dataset_text_field"),
    ),
    special=_special,
    renamed={},
    notes={
        **ARGUMENT_NOTES,
        **each(SPEED, "padding_free pad_to_multiple_of activation_offloading dataset_num_proc"),
        "packing_strategy": "rows are packed without being split",
        "eval_packing": "held-out rows are scored one by one",
        "shuffle_dataset": "rows are shuffled in each epoch, by run.seed",
        "lora_task_type": "the task is a causal language model",
        "eos_token": "the end of a turn is that of the tokenizer's chat template",
        "pad_token": "padding has no loss",
        "gradient_checkpointing_kwargs": SPEED,
        "dataset_streaming": "rows are read whole",
        "ignore_bias_buffers": SPEED,
        "bnb_4bit_quant_storage": SPEED,
        "bnb_4bit_compute_dtype": "run.precision gives the dtype of the computation",
    },
    refused={
        **ARGUMENT_REFUSED,
        "model_init_kwargs": "arguments of the model's class have no counterpart",
        "dataset_kwargs": "arguments of the data set's class have no counterpart",
        "router_aux_loss_coef": "the auxiliary loss of a base's own experts has no counterpart",
        "lora_target_parameters": "adapters act on modules",
    },
    defaults={
        "run.epochs": 3,
        "optim.learning_rate": 2e-5,
        "optim.schedule": "linear",
        "optim.warmup": 0,
        "method.r": 16,
        "method.alpha": 32,
        "method.dropout": 0.05,
        "run.seed": 42,
        "run.output": "trainer_output",
    },
)
