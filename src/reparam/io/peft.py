"""PEFT's format, both ways: `adapter_model.safetensors` and `adapter_config.json` (as PEFT 0.21 writes them).

Keys are `base_model.model.<path>.lora_A.weight` [R, I] and `.lora_B.weight` [O, R]; an embedding has `.lora_embedding_A`
[R, V] and `.lora_embedding_B` [I, R], which are our B and A transposed. Nothing is folded into the factors: the scale
stays in the configuration. What a file asks for beyond that is refused by name, never dropped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import Tensor

from reparam.base import Site
from reparam.io.native import parse_tensors, read_bytes, read_json
from reparam.io.record import FormatError, Record
from reparam.methods.lora import LoRA

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
PARTS = {  # end of a key -> (kind of site, our parameter, transposed)
    ".lora_A.weight": ("linear", "A", False),
    ".lora_B.weight": ("linear", "B", False),
    ".lora_embedding_A": ("embedding", "B", True),
    ".lora_embedding_B": ("embedding", "A", True),
}
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")
# Keys that change the function, with the values that mean "not used".
UNREADABLE = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "megatron_config",
)


def read(folder: Path) -> Record:
    """The adapter that PEFT saved in `folder`. Raises FormatError, naming the key, for what this release cannot honour."""
    file = folder / CONFIG
    config = read_json(file)
    _refuse(config, file)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise FormatError(f"{folder}: adapter_model.bin is a pickle, which is never loaded; save it as safetensors")
    raw = parse_tensors(read_bytes(folder / WEIGHTS), folder / WEIGHTS)
    sites, tensors, frozen, replaced = _sort(raw, config, folder / WEIGHTS)
    return Record(
        method=_method(config, sites, file),
        sites=sites,
        tensors=tensors,
        frozen=frozen,
        replaced=tuple(replaced),
    )


def files(record: Record) -> dict[str, bytes]:
    """The two files' contents by name. Raises FormatError for a method that PEFT has no equal of."""
    method = record.method
    if not isinstance(method, LoRA):
        raise FormatError(f"PEFT has no equal of the method {method.name!r}; save with format='reparam'")
    tensors: dict[str, Tensor] = {}
    for name, site in record.sites.items():
        for end, (kind, parameter, transposed) in PARTS.items():
            if kind == site.kind:
                tensor = record.tensors[f"{name}.{parameter}"]
                tensors[PREFIX + name + end] = tensor.t() if transposed else tensor
        if f"{name}.bias" in record.tensors:
            tensors[f"{PREFIX}{name}.base_layer.bias"] = record.tensors[f"{name}.bias"]
    for module in record.replaced:
        tensors |= {PREFIX + key: t for key, t in record.tensors.items() if key.startswith(module + ".")}
    weights = save_tensors({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, metadata={"format": "pt"})
    config = _config(method, record)
    return {WEIGHTS: weights, CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def _config(method: LoRA, record: Record) -> dict[str, Any]:
    ranks = {name: method.at(name)[0] for name in record.sites}
    alphas = {name: method.at(name)[1] for name in record.sites}
    alpha, alpha_pattern = method.alpha, {}
    if method.scaling in ("alpha", "none"):  # PEFT only divides: alpha_over_r with alpha = s r is the same function
        alphas = {name: method.scale(r=r, alpha=alphas[name]) * r for name, r in ranks.items()}
        alpha = method.scale(r=method.r, alpha=method.alpha) * method.r
    alpha_pattern = {re.escape(name): a for name, a in alphas.items() if a != alpha}
    biased = any(f"{name}.bias" in record.tensors for name in record.sites)
    causal = record.base is not None and record.base.architecture.endswith("ForCausalLM")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": record.base.source if record.base else None,
        "r": method.r,
        "lora_alpha": alpha,
        "lora_dropout": method.dropout,
        "use_rslora": method.scaling == "rslora",
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != method.r},
        "alpha_pattern": alpha_pattern,
        "target_modules": list(record.sites),
        "modules_to_save": list(record.replaced) or None,
        "bias": "lora_only" if biased else "none",
        "inference_mode": True,
    }


def _refuse(config: dict[str, Any], file: Path) -> None:
    kind = config.get("peft_type")
    problems = []
    if kind != "LORA":
        problems.append(f"peft_type {kind!r} is not one that this release reads (it reads LORA)")
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        problems.append(
            f"init_lora_weights {init!r} changes the base when PEFT loads it; convert it first, with PEFT's "
            f"save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    problems += [f"{key} = {config[key]!r} is not supported" for key in UNREADABLE if config.get(key)]
    if config.get("bias", "none") == "all":
        problems.append("bias = 'all' trains biases outside the sites; only 'none' and 'lora_only' are read")
    if problems:
        raise FormatError(f"{file}: " + "; ".join(problems))


def _sort(
    raw: dict[str, Tensor], config: dict[str, Any], file: Path
) -> tuple[dict[str, Site], dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Sites, their tensors, carried base tensors and replaced modules from PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    replaced: list[str] = []
    strange: list[str] = []
    for key, tensor in raw.items():
        path = key.removeprefix(PREFIX)
        end = next((end for end in PARTS if path.endswith(end)), None)
        if end and key.startswith(PREFIX):
            kind, parameter, transposed = PARTS[end]
            kinds[path.removesuffix(end)] = kind
            tensors[f"{path.removesuffix(end)}.{parameter}"] = tensor.t().contiguous() if transposed else tensor
        elif path.endswith(".base_layer.bias"):
            tensors[path.replace(".base_layer.bias", ".bias")] = tensor
        elif path.endswith(".base_layer.weight"):
            frozen[path.replace(".base_layer.weight", ".weight")] = tensor
        elif module := _saved_module(path, config.get("modules_to_save") or []):
            tensors[path] = tensor
            if module not in replaced:
                replaced.append(module)
        elif path.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight")):
            frozen[path] = tensor  # PEFT's save_embedding_layers: the base's own matrix, carried along
        else:
            strange.append(key)
    halves = [f"{n}.{p}" for n in kinds for p in ("A", "B") if f"{n}.{p}" not in tensors]
    if strange or halves or not kinds:
        problems = [f"unknown tensor {key}" for key in strange[:5]] + [f"missing the half {key}" for key in halves[:5]]
        raise FormatError(f"{file}: " + ("; ".join(problems) or "holds no LoRA factors"))
    sites = {}
    for name, kind in kinds.items():
        a, b = tensors[f"{name}.A"], tensors[f"{name}.B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise FormatError(f"{file}: {name}: factors {list(a.shape)} and {list(b.shape)} do not share a rank")
        sites[name] = Site(name, kind, b.shape[0], a.shape[1])  # type: ignore[arg-type]
    return sites, tensors, frozen, replaced


def _saved_module(path: str, names: list[str]) -> str | None:
    """The module whose copy `path` belongs to: up to the end of the first of `names` in it."""
    for name in names:
        found = re.match(rf"(.*\.)?{re.escape(name)}(?=\.)", path)
        if found:
            return found.group()
    return None


def _method(config: dict[str, Any], sites: dict[str, Site], file: Path) -> LoRA:
    def patterns(key: str) -> dict[str, Any]:
        found = {p.removeprefix("^"): v for p, v in (config.get(key) or {}).items()}
        return {p: v for p, v in found.items() if any(re.fullmatch(rf"(.*\.)?({p})", name) for name in sites)}

    method = LoRA(
        r=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        scaling="rslora" if config.get("use_rslora") else "alpha_over_r",
        dropout=config.get("lora_dropout", 0.0),
        rank_pattern=patterns("rank_pattern"),
        alpha_pattern=patterns("alpha_pattern"),
    )
    return method
