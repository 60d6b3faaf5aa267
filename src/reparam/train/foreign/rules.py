"""What becomes of the keys of another tool's configuration: a setting of reparam, a note, or an error.

A key that changes the trained adapter and has no counterpart is an error, unless its value is that of leaving it out. A
key that changes only speed, memory, files or output is noted, with what to do instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from reparam.train.switches import truth

EMPTY = (None, False, "", 0)


class Given:
    """The keys of a file that are still to be read, and what was made of the others."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self.settings: dict[str, Any] = {}
        """Settings by dotted key."""
        self.notes: list[str] = []
        """Keys without a counterpart, each with the reason and what to do."""
        self.problems: list[str] = []

    def take(self, key: str) -> Any:
        """Remove a key and return its value, or None."""
        return self.values.pop(key, None)

    def put(self, key: str, value: Any) -> None:
        """Set a setting; a second, different value is a problem."""
        if key in self.settings and str(self.settings[key]) != str(value):
            self.problems.append(f"two keys set {key}, to {self.settings[key]!r} and {value!r}; delete one of them")
        self.settings[key] = value

    def note(self, key: str, text: str) -> None:
        """Note that a key has no counterpart."""
        self.notes.append(f"no counterpart: {key} ({text})")

    def refuse(self, key: str, text: str) -> None:
        """Refuse the file because of a key."""
        self.problems.append(f"{key}: {text}")


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool and the meaning of its keys."""

    name: str
    own: Collection[str]
    """Keys by which a file of this tool is recognized."""
    special: Callable[[Given], None]
    """Reads the keys that are more than another name of a setting."""
    renamed: Mapping[str, str]
    """Keys that are another name of a setting, beside the aliases of the command line."""
    notes: Mapping[str, str]
    """Keys that do not change the trained adapter, each with what to do."""
    refused: Mapping[str, str]
    """Keys that change the trained adapter and have no counterpart, each with the reason."""
    defaults: Mapping[str, Any]
    """The tool's own defaults where they differ from reparam's."""


def each(text: str, names: str) -> dict[str, str]:
    """The same text for each of several keys, which spaces separate."""
    return dict.fromkeys(names.split(), text)


SPEED = "it changes speed or memory, not the adapter"
OUTPUT = "reparam's own output is in the folder of the run"
_HUB = "upload the folder of the adapter with `hf upload`"
_SHARDED = "torchrun gives each device a process (DDP); sharding the model has no counterpart"
_ENCODED = "rows are read and encoded before the first step"
_DECAY = "the optimizer has torch's own value"

# Keys of transformers' TrainingArguments, which TRL and LLaMA-Factory share, and many of which Axolotl has.
ARGUMENT_NOTES = {
    **each(_SHARDED, "deepspeed fsdp fsdp_config parallelism_config accelerator_config"),
    **each(SPEED, "ddp_timeout ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers"),
    **each(SPEED, "tf32 torch_compile torch_compile_backend torch_compile_mode use_liger_kernel"),
    **each(SPEED, "gradient_checkpointing_kwargs activation_checkpointing_kwargs use_cache"),
    **each(SPEED, "bf16_full_eval fp16_full_eval eval_accumulation_steps batch_eval_metrics"),
    **each(SPEED, "liger_kernel_config torch_empty_cache_steps skip_memory_metrics"),
    **each(_HUB, "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo"),
    **each(_HUB, "hub_always_push hub_revision"),
    **each(_ENCODED, "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor"),
    **each(_ENCODED, "dataloader_persistent_workers remove_unused_columns label_names"),
    **each(OUTPUT, "logging_dir logging_first_step logging_strategy disable_tqdm log_level"),
    **each(OUTPUT, "log_on_each_node log_level_replica include_num_input_tokens_seen debug"),
    **each(OUTPUT, "save_safetensors save_only_model save_on_each_node logging_nan_inf_filter"),
    **each(_ENCODED, "dataloader_multiprocessing_context dataloader_in_order length_column_name"),
    **each(OUTPUT, "include_for_metrics eval_do_concat_batches eval_use_gather_object enable_jit_checkpoint"),
    "greater_is_better": "a lower loss and more exact matches are better",
    **each("torchrun sets it", "local_rank ddp_static_graph"),
    **each("a resumed run equals an uninterrupted one", "ignore_data_skip restore_callback_states_from_checkpoint"),
    **each("set it with the logger's own environment variable", "trackio_bucket_id trackio_static_space_id"),
    "average_tokens_across_devices": "the loss is the mean over the tokens of all devices",
    "project": "set the project with the logger's own environment variable, such as WANDB_PROJECT",
    "trackio_space_id": "set it with the logger's own environment variable",
    "per_device_eval_batch_size": "run.batch_size counts for evaluations, too; it does not change their result",
    "do_eval": "held-out rows are always scored",
    "do_predict": "use `reparam eval`",
    "eval_on_start": "the base is always scored before training",
    "eval_delay": "set run.eval_every",
    "prediction_loss_only": "held-out rows are scored by loss and by exact match",
    "data_seed": "run.seed orders the rows",
    "full_determinism": "on a CPU, runs are deterministic",
    "use_cpu": "the accelerator is used if there is one; hide it with CUDA_VISIBLE_DEVICES=''",
    "trust_remote_code": "reparam never runs code from a model's folder",
    "attn_implementation": SPEED,
    "auto_find_batch_size": "set run.batch_size",
}
ARGUMENT_REFUSED = {
    **each(_DECAY, "adam_beta1 adam_beta2 adam_epsilon optim_args"),
    "train_sampling_strategy": "rows are in random order",
    "optim_target_modules": "it belongs to optimizers that have no counterpart",
    "lr_scheduler_kwargs": "the schedules have transformers' own values",
    "dataloader_drop_last": "the last batch of an epoch is trained on",
}


def arguments(given: Given) -> None:
    """Read the keys of TrainingArguments that are more than another name of a setting."""
    steps, ratio = given.take("warmup_steps"), given.take("warmup_ratio")
    if steps or ratio:
        given.put("optim.warmup", steps or ratio)
    for key, every, what in (("eval_strategy", "eval_steps", "eval"), ("save_strategy", "save_steps", "save")):
        value = given.take(key) or given.take(key.replace("eval_", "evaluation_"))
        if value is not None and value != "steps":
            given.take(every)
            given.note(f"{key}: {value}", f"it is a tenth of the run; set run.{what}_every to a number of steps")
        elif isinstance(given.values.get(every), float) and given.values[every] < 1:
            given.note(f"{every}: {given.take(every)}", f"set run.{what}_every to a number of steps")
    name = given.values.get("optim")
    given.values |= {"optim": OPTIMIZERS.get(name, name)} if name is not None else {}
    resume = given.values.get("resume_from_checkpoint")
    if isinstance(resume, str) and truth(resume) is None:
        given.take("resume_from_checkpoint")
        given.note(f"resume_from_checkpoint: {resume}", "a run goes on from the newest checkpoint in run.output")
    if given.values.get("train_sampling_strategy") == "group_by_length":
        given.values["group_by_length"] = bool(given.take("train_sampling_strategy"))
    metric = given.values.get("metric_for_best_model")
    if isinstance(metric, str):
        name = metric.removeprefix("eval_")
        given.values["metric_for_best_model"] = METRICS.get(name, name)
    for key, known in _DEFAULTS.items():
        if given.values.get(key) == known:
            given.take(key)


_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "train_sampling_strategy": "random"}
METRICS = {"rewards/margins": "reward_margin", "rewards/accuracies": "reward_accuracy", "reward": "mean_reward"}
OPTIMIZERS = {"adamw_hf": "adamw_torch", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit"}
"""Names of optimizers whose states reparam's own implementation keeps in the same way."""


def sources(given: Given, target: str, values: Any, read: Callable[[Any], str | None]) -> None:
    """Set `target` to the sources of one or several data sets, each as `read` gives it; None leaves a problem."""
    found = [read(entry) for entry in (values if isinstance(values, list) else [values])]
    if None not in found:
        given.put(target, ",".join(map(str, found)))


def dataset(
    given: Given, key: str, path: Any, *, split: Any = None, subset: Any = None, files: Any = None
) -> str | None:
    """The value of data.train for a data set: a file, a folder, or a name on the hub with its split."""
    if subset not in EMPTY:
        given.refuse(key, f"the subset {subset!r} of {path}; save it as a file and give that as --data.train")
    if isinstance(files, list) and files and all(isinstance(file, str) for file in files):
        files = ",".join(files)
    if not isinstance(files, str | None):
        given.refuse(f"{key}.data_files", "expected the name of a file, or a list of names")
        return None
    if not isinstance(path, str) or not path:
        given.refuse(key, "names no data set")
        return None
    if files:
        return files
    plain = split in (*EMPTY, "train")
    if not plain and "[" in str(split):
        given.refuse(key, f"the slice {split!r}; set data.max_rows, or save the rows as a file")
    return path if plain else f"{path}:{split}"
