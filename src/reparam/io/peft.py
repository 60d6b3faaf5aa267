"""PEFT's format, both ways: `adapter_model.safetensors` and `adapter_config.json` (as PEFT 0.21 writes them).

Keys are `base_model.model.<path>.lora_A.weight` [R, I] and `.lora_B.weight` [O, R]; an embedding has
`.lora_embedding_A` [R, V] and `.lora_embedding_B` [I, R], which are our B and A transposed. DoRA adds
`.lora_magnitude_vector` [O]; on an embedding PEFT's has one for each column, which is not read. AdaLoRA's files are in
`peft_adalora.py`. Nothing is folded into the factors: the scale stays in the configuration. What a file asks for beyond
that is refused by name, never dropped (`peft_config.py`).

The format binds nothing: an edited lora_alpha, or weights of another training run with the same shapes, load without a
complaint, and the base is named but not digested. Only what contradicts itself, or the model, can be refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from reparam.core.base import Site
from reparam.errors import FormatError
from reparam.io import peft_adalora as adalora
from reparam.io.native import FLOATS, pack_tensors, parse_tensors, read_bytes, read_json
from reparam.io.peft_config import Honored, parse
from reparam.io.record import Base, Record, listed
from reparam.methods.adalora.method import AdaLoRA
from reparam.methods.dora import DoRA
from reparam.methods.lora import LoRA

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
PARTS = {  # end of a key -> (kind of site, our parameter, transposed)
    ".lora_A.weight": ("linear", "A", False),
    ".lora_B.weight": ("linear", "B", False),
    ".lora_embedding_A": ("embedding", "B", True),
    ".lora_embedding_B": ("embedding", "A", True),
}
MAGNITUDE = ".lora_magnitude_vector"  # DoRA's, [O]


def read(folder: Path) -> Record:
    """The adapter that PEFT saved in `folder`. Raises FormatError, naming the key, for what cannot be honored."""
    file = folder / CONFIG
    values = read_json(file)
    own: adalora.Settings | None = None
    if values.get("peft_type") == "ADALORA":
        own, values = adalora.as_lora(values, file)
    config = parse(values, file)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise FormatError(
            f"{folder}: adapter_model.bin is a pickle, which is never loaded; load it with PEFT and save it again, "
            f"which writes {WEIGHTS}"
        )
    raw = parse_tensors(read_bytes(folder / WEIGHTS), folder / WEIGHTS)
    if own is not None:
        raw, lambdas = adalora.split(raw, PREFIX)
    tensors, kinds, frozen, replaced = _sort(raw, config, folder / WEIGHTS)
    sites = _sites(tensors, kinds, folder / WEIGHTS, least=1 if own is None else 0)
    lora = _method(config, sites, file)
    method: LoRA | AdaLoRA = lora
    ranks = {name: len(tensors[f"{name}.A"]) for name in sites}
    if own is not None:
        adalora.check(own, lambdas, ranks, folder / WEIGHTS)
        tensors |= {f"{name}.E": value[:, 0] for name, value in lambdas.items()}
        method = adalora.method_of(own, lora, ranks, file)
    else:
        _check_ranks(lora, ranks, file)
    if config.use_dora:
        moved = {f"{name}.{part}": f"{name}.low_rank.{part}" for name in sites for part in ("A", "B")}
        tensors = {moved.get(key, key): tensor for key, tensor in tensors.items()}
    base = Base("", config.base_model_name_or_path, {}) if config.base_model_name_or_path else None
    return Record(method, sites, tensors, replaced=tuple(replaced), base=base, frozen=frozen, claims=config)


def _check_ranks(method: LoRA, ranks: dict[str, int], file: Path) -> None:
    """Raise FormatError where weights have another rank than the settings say."""
    wrong = [
        f"{name}: rank {rank} in {WEIGHTS}, {method.at(name)[0]} by r and rank_pattern"
        for name, rank in ranks.items()
        if rank != method.at(name)[0]
    ]
    if wrong:
        raise FormatError(
            f"{file}: {listed(wrong)}; of several patterns that match, the first counts, and PEFT sorts them"
        )


def files(record: Record) -> dict[str, bytes]:
    """The two files' contents by name. Raises FormatError for what PEFT has no equal of."""
    method = record.method
    if not isinstance(method, LoRA | AdaLoRA):
        raise FormatError(f"PEFT has no equal of the method {method.name!r}; save with format='reparam'")
    vectors = [name for name, site in record.sites.items() if site.kind == "vector"]
    if vectors:
        raise FormatError(f"PEFT has no equal of an update on a vector: {listed(vectors)}; save with format='reparam'")
    dora = isinstance(method, DoRA)
    if isinstance(method, DoRA):
        _check_dora(method, record)
    if isinstance(method, AdaLoRA):
        lora = LoRA(r=method.init_r, alpha=method.alpha, dropout=method.dropout)
        config = _config(lora, record) | adalora.config_of(method, record)
    else:
        config = _config(method, record)
    tensors: dict[str, Tensor] = {}
    for name, site in record.sites.items():
        for end, (kind, parameter, transposed) in PARTS.items():
            if kind == site.kind and not isinstance(method, AdaLoRA):
                tensor = record.tensors[f"{name}.low_rank.{parameter}" if dora else f"{name}.{parameter}"]
                tensors[PREFIX + name + end] = tensor.t() if transposed else tensor
        if isinstance(method, AdaLoRA):
            tensors |= adalora.tensors_of(name, record, PREFIX)
        if dora:
            tensors[PREFIX + name + MAGNITUDE] = record.tensors[f"{name}.magnitude"]
        if f"{name}.bias" in record.tensors:
            tensors[f"{PREFIX}{name}.base_layer.bias"] = record.tensors[f"{name}.bias"]
    for module in record.replaced:
        tensors |= {PREFIX + key: t for key, t in record.tensors.items() if key.startswith(module + ".")}
    weights = pack_tensors(tensors, metadata={"format": "pt"})
    return {WEIGHTS: weights, CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def _check_dora(method: DoRA, record: Record) -> None:
    """Raise FormatError for what PEFT's DoRA is not."""
    problems = ["magnitudes of columns (norm_axis='input')"] * (method.norm_axis != "output")
    problems += ["magnitudes alone (magnitude_only)"] * method.magnitude_only
    problems += [
        f"a magnitude for each row of the embedding {n}" for n, s in record.sites.items() if s.kind != "linear"
    ]
    if problems:
        raise FormatError(f"PEFT has no equal of DoRA with {listed(problems)}; save with format='reparam'")


def _config(method: LoRA, record: Record) -> dict[str, Any]:
    """The keys that are needed, and no others: a reader of another release may not know them."""
    ranks = {name: method.at(name)[0] for name in record.sites}
    alphas = {name: method.at(name)[1] for name in record.sites}
    alpha = method.alpha
    if method.scaling in ("alpha", "none"):  # PEFT only divides: alpha_over_r with alpha = s r is the same function
        alphas = {name: method.scale(r=r, alpha=alphas[name]) * r for name, r in ranks.items()}
        alpha = method.scale(r=method.r, alpha=method.alpha) * method.r
    architecture = record.base.architecture if record.base else ""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": record.base.source if record.base else None,
        "r": method.r,
        "lora_alpha": _number(alpha),
        "lora_dropout": method.dropout,
        "use_rslora": method.scaling == "rslora",
        "use_dora": isinstance(method, DoRA),
        "rank_pattern": {_exactly(name): r for name, r in ranks.items() if r != method.r},
        "alpha_pattern": {_exactly(name): _number(a) for name, a in alphas.items() if a != alpha},
        "target_modules": _targets(record),
        "modules_to_save": _whole(record),
        "bias": "lora_only" if any(f"{name}.bias" in record.tensors for name in record.sites) else "none",
        "inference_mode": True,
    }
    if any(site.transposed for site in record.sites.values()):
        config["fan_in_fan_out"] = True  # or PEFT warns
    return config


def _targets(record: Record) -> list[str] | str:
    """What PEFT expands to exactly the sites: ends of paths if they do, else whole paths, else a regular expression."""
    ends = sorted({name.rpartition(".")[2] for name in record.sites})
    for names in (ends, list(record.sites)) if record.modules else (list(record.sites),):
        found = {m for m in (*record.modules, *record.sites) if any(m == n or m.endswith("." + n) for n in names)}
        if found == record.sites.keys():
            return names
    return "|".join(re.escape(name) for name in record.sites)


def _whole(record: Record) -> list[str] | None:
    """The modules that are replaced. PEFT takes every module whose path ends so, and there is no way to say less."""
    for name in record.replaced:
        others = [m for m in record.modules if m.endswith(name) and m not in record.replaced]
        if others:
            raise FormatError(
                f"PEFT names modules to save by the ends of their paths, and {name!r} is the end of {others[0]} too; "
                f"save with format='reparam'"
            )
    return list(record.replaced) or None


def _exactly(name: str) -> str:
    """A pattern for this path and no other."""
    return "^" + re.escape(name)


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _sort(
    raw: dict[str, Tensor], config: Honored, file: Path
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor], list[str]]:
    """Our tensors, the kinds of their sites, tensors of the base, and modules replaced whole, from PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    replaced: list[str] = []
    biased: list[str] = []
    magnitudes: list[str] = []
    strange: list[str] = []
    for key, tensor in raw.items():
        path = key.removeprefix(PREFIX)
        end = next((end for end in PARTS if path.endswith(end)), None)
        if not key.startswith(PREFIX):
            strange.append(key)
        elif end:
            kind, parameter, transposed = PARTS[end]
            kinds[path.removesuffix(end)] = kind
            tensors[f"{path.removesuffix(end)}.{parameter}"] = tensor.t() if transposed and tensor.ndim == 2 else tensor
        elif path.endswith(MAGNITUDE) and config.use_dora:
            magnitudes.append(path.removesuffix(MAGNITUDE))
            tensors[f"{magnitudes[-1]}.magnitude"] = tensor
        elif ".lora_" in path:
            strange.append(key)
        elif path.endswith(".base_layer.bias"):
            biased.append(path.removesuffix(".base_layer.bias"))
            tensors[f"{biased[-1]}.bias"] = tensor
        elif module := _saved_module(path, config):
            tensors[path] = tensor
            if module not in replaced:
                replaced.append(module)
        else:  # PEFT's save_embedding_layers: the base's own matrix, carried along
            frozen[path.replace(".base_layer.", ".")] = tensor
    strange += [f"{PREFIX}{site}.base_layer.bias" for site in biased if site not in kinds]
    strange += [f"{PREFIX}{site}{MAGNITUDE}" for site in magnitudes if site not in kinds]
    problems = [f"unknown tensor {key}" for key in strange]
    for site, kind in kinds.items() if config.use_dora else ():
        if kind == "embedding":
            problems.append(f"{site}: PEFT's DoRA on an embedding has a magnitude for each column, which is not read")
        elif site not in magnitudes:
            problems.append(f"missing {PREFIX}{site}{MAGNITUDE}")
    if problems:
        raise FormatError(f"{file}: {listed(problems)}")
    return tensors, kinds, frozen, replaced


def _saved_module(path: str, config: Honored) -> str | None:
    """The outermost module around this tensor that is trained whole."""
    parts = path.split(".")
    return next((m for i in range(1, len(parts)) if config.whole(m := ".".join(parts[:i]))), None)


def _sites(tensors: dict[str, Tensor], kinds: dict[str, str], file: Path, *, least: int) -> dict[str, Site]:
    """The sites that the factors belong to. Raises FormatError for halves, and factors that do not fit each other.

    `least` is the lowest rank that there can be.
    """
    if not kinds:
        raise FormatError(f"{file}: holds no LoRA factors")
    keys = {(kind, parameter): end for end, (kind, parameter, _) in PARTS.items()}
    problems = [
        f"missing {PREFIX}{name}{keys[kind, parameter]}"
        for name, kind in kinds.items()
        for parameter in ("A", "B")
        if f"{name}.{parameter}" not in tensors
    ]
    sites = {}
    for name, kind in kinds.items() if not problems else ():
        a, b = tensors[f"{name}.A"], tensors[f"{name}.B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (a.shape[1], len(b)) or len(a) < least:
            problems.append(
                f"{PREFIX}{name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are no factors of a matrix"
            )
        elif a.dtype not in FLOATS or b.dtype not in FLOATS:
            problems.append(f"{PREFIX}{name}: lora_A is {a.dtype}, lora_B is {b.dtype}")
        else:
            sites[name] = Site(name, kind, b.shape[0], a.shape[1])
    if problems:
        raise FormatError(f"{file}: {listed(problems)}")
    return sites


def _method(config: Honored, sites: Iterable[str], file: Path) -> LoRA:
    def used(patterns: dict[str, Any] | None) -> dict[str, Any]:
        """PEFT leaves patterns that match nothing in the file; here they would be an error."""
        return {p: v for p, v in (patterns or {}).items() if any(re.match(rf"(.*\.)?({p})$", name) for name in sites)}

    try:
        return (DoRA if config.use_dora else LoRA)(
            r=config.r,
            alpha=config.lora_alpha,
            scaling="rslora" if config.use_rslora else "alpha_over_r",
            dropout=config.lora_dropout,
            rank_pattern=used(config.rank_pattern),
            alpha_pattern=used(config.alpha_pattern),
        )
    except ValueError as error:
        raise FormatError(f"{file}: {error}") from None
