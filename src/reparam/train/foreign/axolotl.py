"""The configuration of `axolotl train`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from reparam.data.templates import names
from reparam.train.foreign.rules import (
    ARGUMENT_NOTES,
    ARGUMENT_REFUSED,
    EMPTY,
    OUTPUT,
    SPEED,
    Given,
    Tool,
    arguments,
    dataset,
    each,
    sources,
)
from reparam.train.switches import truth

_TYPES = ("chat_template", "alpaca", "completion", "sharegpt", "pretrain")
_ENTRY_NOTES = ("type", "ds_type", "roles_to_train", "train_on_eos", "train_on_eot", "chat_template", "conversation")
_KERNELS = ("liger", "cut_cross_entropy")


def _special(given: Given) -> None:
    given.values |= {
        new: given.values.pop(old)
        for old, new in (("evaluation_strategy", "eval_strategy"), ("optimizer", "optim"))
        if old in given.values
    }
    arguments(given)
    _adapter(given)
    template = given.take("chat_template")
    if template in names():
        given.put("data.chat_template", template)
    elif template not in (*EMPTY, "tokenizer_default"):
        given.note("chat_template", "the tokenizer's own chat template is used; data.chat_template chooses another one")
    for key, target in (("datasets", "data.train"), ("test_datasets", "data.valid")):
        values = given.take(key)
        if values not in (*EMPTY, []):
            sources(given, target, values, partial(_entry, given, key))
    precision = given.values.get("bf16")
    if str(precision).lower() in ("auto", "full"):
        on = str(precision).lower() == "full" or torch.accelerator.is_available()
        given.values["bf16"] = on
    if str(given.values.get("fp16")).lower() == "auto":
        given.take("fp16")
    if given.values.get("gradient_checkpointing") in ("unsloth", "offload", "offload_disk"):
        given.values["gradient_checkpointing"] = True
    size = given.values.get("val_set_size")
    if size in EMPTY:
        given.take("val_set_size")
        if "data.valid" not in given.settings:
            given.note("val_set_size: 0", "5 % of the rows are held out, to check the run; see data.holdout")
    elif isinstance(size, int | float) and size >= 1:
        given.refuse("val_set_size", "a number of rows has no counterpart; give a share below 1")
    for key, every in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        if given.take(key):
            given.note(key, f"it is a tenth of the run; set run.{every}_every to a number of steps")
    _loggers(given)
    for plugin in given.take("plugins") or []:
        if not any(name in str(plugin) for name in _KERNELS):
            given.refuse(f"plugins: {plugin}", "code of other packages is not loaded")


def _adapter(given: Given) -> None:
    kind = given.take("adapter")
    if kind == "qlora":
        given.put("base.storage", "nf4")
    elif kind in EMPTY:
        given.put("method.name", "full")
        given.note("adapter", "without it, all weights are trained; add adapter: lora for LoRA")
    elif kind not in ("lora", "dora"):
        given.refuse(f"adapter: {kind}", "expected lora or qlora")
    if kind == "dora":
        given.put("method.name", "dora")
    linear = truth(given.take("lora_target_linear"))
    modules = given.values.get("lora_target_modules")
    if linear and modules in (*EMPTY, []):
        given.put("adapter.targets", "all-linear")
    elif linear:
        given.refuse("lora_target_linear", "lora_target_modules is set, too; delete one of the two")
    if given.take("peft_init_lora_weights") not in (*EMPTY, True):
        given.refuse("peft_init_lora_weights", "LoRA starts with A at random and B at zero")


def _entry(given: Given, key: str, entry: Any) -> str | None:
    """The value of data.train for one entry of `datasets`."""
    if not isinstance(entry, Mapping):
        given.refuse(key, "expected entries with a path and a type")
        return None
    left = dict(entry)
    kind = left.get("type")
    if not isinstance(kind, str | None) or (kind or "chat_template").split(".")[0].split(":")[0] not in _TYPES:
        shown = kind if isinstance(kind, str) else "a prompt of its own"
        given.refuse(f"{key}.type", f"{shown}: expected {', '.join(_TYPES)}; write the rows in one of these forms")
    field = left.pop("field", None)
    if field not in (*EMPTY, "text") and kind in ("completion", "pretrain"):
        given.put("data.columns", f"text={field}")
    held = left.pop("field_messages", None)
    if held not in (*EMPTY, "messages", "conversations"):
        given.put("data.columns", f"messages={held}")
    mapped = left.pop("message_property_mappings", None) or {}
    names = (
        (left.pop("message_field_role", None) or mapped.get("role", "role")),
        (left.pop("message_field_content", None) or mapped.get("content", "content")),
    )
    if names not in (("role", "content"), ("from", "value")):
        given.refuse(f"{key}.message_property_mappings", "messages have role and content, or from and value")
    if left.pop("roles", None):
        given.note(f"{key}.roles", "roles are system, user, assistant and tool, or ShareGPT's names for them")
    path, split, subset = (left.pop(part, None) for part in ("path", "split", "name"))
    files = left.pop("data_files", None)
    for part in set(left) - set(_ENTRY_NOTES):
        if left[part] not in EMPTY:
            given.refuse(f"{key}.{part}", "has no counterpart; write the rows as they are to be trained on")
    return dataset(given, key, path, split=split, subset=subset, files=files)


def _loggers(given: Given) -> None:
    wanted = []
    if given.take("use_tensorboard"):
        wanted.append("tensorboard")
    project = given.take("wandb_project")
    if project and given.values.get("wandb_mode") not in ("disabled", "offline"):
        wanted.append("wandb")
        given.note("wandb_project", f"set the environment variable WANDB_PROJECT={project}")
    if given.take("use_mlflow") or given.values.get("mlflow_tracking_uri"):
        wanted.append("mlflow")
    if wanted:
        given.put("run.loggers", ",".join(wanted))
    if name := given.take("wandb_name"):
        given.put("run.name", name)


_ENVIRONMENT = "set it with the logger's own environment variable"
_OTHER = "it is another way of training, which has no counterpart"
AXOLOTL = Tool(
    name="Axolotl",
    own=(
        *("base_model", "sequence_len", "micro_batch_size", "num_epochs", "val_set_size", "lora_target_linear"),
        *("sample_packing", "dataset_prepared_path", "lora_model_dir", "adapter", "evals_per_epoch", "saves_per_epoch"),
        *("pad_to_sequence_len", "train_on_inputs", "lr_scheduler", "optimizer", "special_tokens", "wandb_project"),
    ),
    special=_special,
    renamed={
        **{"peft_use_dora": "use_dora", "peft_use_rslora": "use_rslora", "sample_packing": "packing"},
        **dict.fromkeys(("rl_beta", "dpo_beta", "orpo_alpha"), "optim.beta"),
        "kto_desirable_weight": "prefer.desirable_weight",
        "kto_undesirable_weight": "prefer.undesirable_weight",
        "noisy_embedding_alpha": "neftune_noise_alpha",
    },
    notes={
        **ARGUMENT_NOTES,
        **each("an answer ends as the chat template ends it", "eot_tokens train_on_eot"),
        "tokenizer_use_mistral_common": "the tokenizer of the base's folder is used",
        "special_tokens": "those of the tokenizer are used; padding has no loss",
        "chat_template_jinja": "the tokenizer's own chat template is used; save the tokenizer with the other template",
        **each("the base's files say it", "model_type tokenizer_type tokenizer_config processor_type"),
        **each("the files say it", "is_llama_derived_model is_mistral_derived_model base_model_config"),
        **each("nothing is cached", "dataset_prepared_path dataset_processes dataset_num_proc"),
        **each("one data set", "push_dataset_to_hub shuffle_merged_datasets dataset_exact_deduplication"),
        **each(SPEED, "pad_to_sequence_len eval_sample_packing multipack_real_batches"),
        **each(SPEED, "flash_attention xformers_attention sdp_attention flex_attention sage_attention"),
        **each(SPEED, "eager_attention flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp"),
        **each(SPEED, "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_fan_in_fan_out"),
        **each(SPEED, "liger_rope liger_rms_norm liger_glu_activation liger_layer_norm"),
        **each(SPEED, "liger_fused_linear_cross_entropy liger_cross_entropy cut_cross_entropy"),
        **each(SPEED, "low_cpu_mem_usage gpu_memory_limit torch_compile device_map gc_steps"),
        **each(SPEED, "bfloat16 float16 tf32 ddp activation_offloading embeddings_skip_upcast"),
        **each(_ENVIRONMENT, "wandb_entity wandb_watch wandb_log_model wandb_mode wandb_run_id"),
        **each(_ENVIRONMENT, "mlflow_tracking_uri mlflow_experiment_name mlflow_run_name"),
        **each(OUTPUT, "eval_table_size eval_max_new_tokens eval_causal_lm_metrics eval_batch_size"),
        **each(OUTPUT, "save_first_step loss_watchdog_threshold loss_watchdog_patience profiler_steps"),
        **each(OUTPUT, "auto_resume_from_checkpoints strict hf_use_auth_token hub_strategy"),
        "local_rank": "torchrun sets it",
        "fsdp_version": "torchrun gives each device a process (DDP)",
    },
    refused={
        **ARGUMENT_REFUSED,
        **each(_OTHER, "reward_model process_reward_model relora_steps relora unfrozen_parameters"),
        **each(_OTHER, "s2_attention sequence_parallel_degree context_parallel_size pretraining_dataset"),
        **each(_OTHER, "lora_layers_to_transform lora_layers_pattern lora_target_parameters lr_groups"),
        **each("the schedules have no floor", "cosine_min_lr_ratio cosine_constant_lr_ratio loraplus_lr_groups"),
        **each("the tokenizer stays as it is", "added_tokens_overrides tokens resize_token_embeddings_to_32x"),
        **each("the base is used as it is", "overrides_of_model_config model_kwargs rope_theta"),
        "scaling_softmax": "attention is the base's own",
        "gptq": "the storages are nf4 and int8",
    },
    defaults={
        "run.batch_size": 1,
        "data.max_length": 512,
        "data.holdout": 0.05,
        "optim.warmup": 0,
        "run.seed": 42,
        "run.output": "./model-out",
        "method.dropout": 0,
    },
)
