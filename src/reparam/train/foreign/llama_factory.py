"""The configuration of LLaMA-Factory's `llamafactory-cli train`, and the names in its `dataset_info.json`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from reparam.core.checks import nearest
from reparam.core.strict_json import loads
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

_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
_COLUMNS |= {"chosen": "chosen", "rejected": "rejected", "kto_tag": "label"}
_LOSSES = ("sigmoid", "hinge", "ipo")
_TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}
_MIXES = {"interleave_under": "under", "interleave_over": "over"}
_LARGEST = 16 << 20  # bytes of dataset_info.json


def _special(given: Given) -> None:
    if given.take("neat_packing"):  # packs are always such that rows do not see each other
        given.take("packing")
        given.put("data.packing", True)
    arguments(given)
    folder = str(given.take("dataset_dir") or "data")
    for key, target in (("dataset", "data.train"), ("eval_dataset", "data.valid")):
        names = given.take(key)
        if names not in EMPTY:
            listed = names.split(",") if isinstance(names, str) else names
            sources(given, target, listed, partial(_source, given, key, Path(folder)))
    if given.values.get("stage") == "pt":
        given.take("stage")
        if truth(given.take("packing")) is not False:
            given.put("data.packing", True)
            given.note(
                "stage: pt", "texts share rows, as in LLaMA-Factory, but do not see each other; see data.packing"
            )
    if (strategy := given.take("mix_strategy")) not in (*EMPTY, "concat"):
        if strategy not in _MIXES:
            given.refuse(f"mix_strategy: {strategy}", f"expected concat, {' or '.join(_MIXES)}")
        elif given.values.get("interleave_probs") in EMPTY:
            given.refuse(f"mix_strategy: {strategy}", "set interleave_probs, too")
        else:
            given.put("data.mix", _MIXES[strategy])
    if given.values.get("finetuning_type", "lora") == "lora":
        if given.values.get("lora_target", "all") == "all":
            given.values["lora_target"] = "all-linear"
        if given.values.get("lora_alpha") is None:
            given.values["lora_alpha"] = 2 * int(given.values.get("lora_rank") or 8)
    if (loss := given.take("pref_loss")) == "orpo":
        given.take("stage")
        given.put("run.objective", "orpo")
    elif loss not in (*EMPTY, *_LOSSES):
        given.refuse(f"pref_loss: {loss}", f"expected orpo, {' or '.join(_LOSSES)}")
    elif loss not in (*EMPTY, "sigmoid"):
        given.put("prefer.loss_type", loss)
    if given.take("quantization_method") not in (*EMPTY, "bnb", "bitsandbytes", "BNB"):
        given.refuse("quantization_method", "matrices are quantized to nf4 or int8 while they are read; use bnb")
    if truth(given.take("pure_bf16")):
        given.put("run.precision", "bfloat16")
        given.note("pure_bf16", "the adapter trains in float32; the base computes in bfloat16")
    if truth(given.take("disable_gradient_checkpointing")) is False:
        given.put("run.gradient_checkpointing", True)
    if given.values.get("val_size") in EMPTY:
        given.take("val_size")
        if "data.valid" not in given.settings:
            given.note("val_size: 0", "5 % of the rows are held out, to check the run; see data.holdout")
    elif float(given.values["val_size"]) >= 1:
        given.refuse("val_size", "a number of rows has no counterpart; give a share below 1")


def _source(given: Given, key: str, folder: Path, name: Any) -> str | None:
    """The file or the name on the hub of an entry of dataset_info.json; a problem, and None, if there is none."""
    file, name = folder / "dataset_info.json", str(name).strip()
    if not file.is_file():
        if Path(name).exists():
            return name
        given.refuse(key, f"{name!r} is looked up in {file}, which does not exist; give the rows as --data.train FILE")
        return None
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST:,} bytes")
        known = loads(file.read_text(encoding="utf-8"))
        entry = known.get(name)
    except (OSError, ValueError, AttributeError) as error:
        given.refuse(key, f"{file} cannot be read: {error}")
        return None
    if not isinstance(entry, dict):
        given.refuse(key, f"{file} has no {name!r}{nearest(name, list(known))}")
        return None
    return _entry(given, key, entry, folder)


def _entry(given: Given, key: str, entry: dict[str, Any], folder: Path) -> str | None:
    for unread in ("script_url", "cloud_file_name", "folder", "ms_hub_url", "om_hub_url"):
        if entry.get(unread) and not entry.get("hf_hub_url"):
            given.refuse(key, f"{unread} is not read; download the rows and give the file as --data.train")
            return None
    if entry.get("ranking") and given.values.get("stage") != "dpo":
        given.refuse(key, "it holds pairs of preferred answers, which are for stage: dpo")
        return None
    _columns(given, key, entry.get("columns") or {}, entry.get("tags") or {})
    if limit := entry.get("num_samples"):
        given.put("data.max_rows", limit)
    if entry.get("file_name"):
        inside = (folder / entry["file_name"]).resolve()
        if not inside.is_relative_to(folder.resolve()):
            given.refuse(key, f"{entry['file_name']!r} is outside {folder}; give the file as --data.train")
            return None
        return str(folder / entry["file_name"])
    return dataset(given, key, entry.get("hf_hub_url"), split=entry.get("split"), subset=entry.get("subset"))


def _columns(given: Given, key: str, columns: dict[str, Any], tags: dict[str, Any]) -> None:
    """Read under which keys the rows hold the parts of a format, and the words for their roles."""
    if given.values.get("stage") == "pt":  # texts are under the key of prompts
        text = columns.get("prompt", "instruction")
        if text != "text" and key == "dataset":
            given.put("data.columns", f"text={text}")
        return
    pairs = []
    for part, name in columns.items():
        if part == "messages" and name in ("conversations", "messages"):
            continue
        own = "conversations" if part == "messages" else "tools" if part == "tools" else _COLUMNS.get(part)
        if own is None:
            given.refuse(key, f"the column {part!r} has no counterpart")
        elif own != name and name:
            pairs.append(f"{own}={name}")
    if pairs and key == "dataset":
        given.put("data.columns", ",".join(pairs))
    for tag, value in tags.items():
        if value not in _TAGS.get(tag, ()):
            given.refuse(key, f"{tag} {json.dumps(value)}: expected {' or '.join(_TAGS.get(tag, ('no such tag',)))}")


_OTHER = "it is another method or optimizer, which has no counterpart"
LLAMA_FACTORY = Tool(
    name="LLaMA-Factory",
    own=(
        "neat_packing",
        *("stage", "finetuning_type", "cutoff_len", "lora_target", "lora_rank", "template", "dataset_dir", "dataset"),
        *("quantization_bit", "plot_loss", "val_size", "overwrite_cache", "preprocessing_num_workers", "max_samples"),
        *("flash_attn", "mask_history", "train_on_prompt", "pure_bf16"),
    ),
    special=_special,
    renamed={
        "pref_beta": "optim.beta",
        "kto_chosen_weight": "prefer.desirable_weight",
        "kto_rejected_weight": "prefer.undesirable_weight",
    },
    notes={
        **ARGUMENT_NOTES,
        "template": "the tokenizer's own chat template is used; data.chat_template chooses another one",
        "tool_format": "the tokenizer's own chat template writes tools",
        **each("nothing is cached", "overwrite_cache preprocessing_num_workers preprocessing_batch_size"),
        **each("nothing is cached", "cache_dir tokenized_path data_shared_file_system"),
        **each(OUTPUT, "plot_loss print_param_status include_effective_tokens_per_second"),
        **each(SPEED, "flash_attn enable_liger_kernel use_unsloth use_unsloth_gc"),
        **each(SPEED, "low_cpu_mem_usage use_reentrant_gc upcast_layernorm upcast_lmhead_output"),
        **each(SPEED, "quantization_device_map offload_folder use_kv_cache use_fast_tokenizer"),
        **each("it is for generation", "infer_backend infer_dtype do_sample temperature top_p"),
        **each("it is for generation", "top_k num_beams max_new_tokens predict_with_generate"),
        **each("use `reparam merge`", "export_dir export_size export_device export_legacy_format"),
        **each("log in with `hf auth login`", "hf_hub_token ms_hub_token om_hub_token"),
        **each("rows are texts", "buffer_size media_dir image_max_pixels video_max_pixels"),
        **each(SPEED, "ray_run_name ray_storage_path ray_num_workers resources_per_worker"),
        "use_swanlab": "set run.loggers to swanlab",
        "swanlab_project": "set it with the logger's own environment variable",
        "swanlab_run_name": "set run.name",
        "ignore_pad_token_for_loss": "padding has no loss",
        "compute_accuracy": "held-out rows are scored by loss and by exact match",
        "eval_on_each_dataset": "there is one set of held-out rows",
        "streaming": "rows are read whole",
    },
    refused={
        **ARGUMENT_REFUSED,
        **each(_OTHER, "use_galore use_apollo use_badam use_muon use_adam_mini use_llama_pro"),
        **each(_OTHER, "pissa_init use_dft_loss use_asft_loss use_eaft_loss use_mca use_kt"),
        **each("the base is used as it is", "rope_scaling shift_attn mixture_of_depths"),
        **each("the base and its tokenizer stay as they are", "resize_vocab add_tokens add_special_tokens"),
        **each("the tokenizer stays as it is", "new_special_tokens_config split_special_tokens"),
        "moe_aux_loss_coef": "the auxiliary loss of a base's own experts has no counterpart",
        "create_new_adapter": "merge the first adapter with `reparam merge`, and train on the merged model",
        "train_from_scratch": "reparam adapts trained models",
        "disable_shuffling": "rows are shuffled in each epoch",
        "fp8": "the storages are nf4 and int8",
        "pref_ftx": "a supervised loss beside the loss of pairs has no counterpart; use pref_loss: orpo",
        "dpo_label_smoothing": "the loss of a pair with smoothed labels has no counterpart",
        "ref_model": "the reference is the model before training",
    },
    defaults={
        "run.epochs": 3,
        "optim.learning_rate": 5e-5,
        "optim.schedule": "linear",
        "optim.warmup": 0,
        "data.max_length": 2048,
        "run.seed": 42,
        "run.output": "trainer_output",
    },
)
