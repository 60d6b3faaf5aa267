"""Kinds of folders that reparam reads, each with a reader and, where another library reads it too, a judge."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import peft
import torch
from adapters import trained
from damage import damage, sign
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import reparam
from reparam.core.memory import lacks_memory
from reparam.errors import ReparamError
from reparam.hf import prompts
from reparam.hf.models import load_base, load_tokenizer, save_model

TEXT = "def area(self, width=2):\n    return width"
IDS = torch.randint(2, 4096, (2, 9), generator=torch.Generator().manual_seed(3))


@dataclasses.dataclass(frozen=True)
class Kind:
    """How such a folder is made and read; the results of reading are compared with `same`."""

    make: Callable[[Path], object]
    read: Callable[[Path], Any]
    judge: Callable[[Path], Any] | None = None
    signed: bool = False
    """Whether its files hold digests, so that a damaged copy with new digests is tried, too."""


KINDS: dict[str, Kind] = {}


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal; tensors but for rounding."""
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def outcome(kind: Kind, folder: Path, expected: Any, *, signed: bool = False) -> str:
    """What reading the folder led to; a text that starts with "WRONG" or "RAW" is a fault."""
    try:
        found = kind.read(folder)
    except ReparamError as error:
        return sentence(str(error), folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | TimeoutError):
            raise
        if lacks_memory(error):
            return "refused: memory"
        return f"RAW {type(error).__name__}: {error}"[:300]
    if same(found, expected):
        return "same"
    if signed:
        return "as signed"
    if kind.judge is None:
        return "WRONG: other results"
    try:
        told = kind.judge(folder)
    except BaseException as error:
        return f"WRONG: other results, where the judge says {type(error).__name__}: {error}"[:300]
    return "as the judge" if same(found, told) else "WRONG: results of neither the original nor the judge"


def sentence(text: str, folder: Path) -> str:
    """Whether an error is one sentence of bounded length about the folder."""
    if "\n" in text.strip():
        return f"WRONG: several lines: {text}"[:300]
    if len(text) > 5000:
        return f"WRONG: {len(text)} characters: {text[:200]}"
    if any(ord(letter) < 32 for letter in text):
        return f"WRONG: control characters: {text!r}"[:300]
    return f"refused: {text}" if str(folder) in text else f"WRONG: names no file: {text}"[:300]


def attempt(name: str, original: Path, folder: Path, seed: int, expected: Any) -> tuple[str, str]:
    """Damage a copy of the folder and read it: the damage and the outcome."""
    draw = random.Random(f"{name} {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    done = [damage(folder, draw)]
    if draw.random() < 0.15:
        unreadable = (ValueError, OSError, RecursionError, KeyError, TypeError, IndexError, AttributeError)
        with contextlib.suppress(*unreadable):  # the second damage needs a file that can be read
            done.append(damage(folder, draw))
    signed = KINDS[name].signed and draw.random() < 0.6 and sign(folder)
    return "; ".join(done) + (" (signed)" if signed else ""), outcome(KINDS[name], folder, expected, signed=signed)


# ---- adapters


def loaded(folder: Path) -> Tensor:
    model = models.llama()
    reparam.load(model, folder)
    return models.logits(model)


def saved(format: str, **settings: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        adapter = trained(models.llama(), **settings)
        adapter.finish()
        adapter.save(folder, format=format)

    return make


def by_peft(folder: Path) -> Tensor:
    """In float64, because PEFT's norms overflow in float32. PEFT cannot read null as the default value."""
    with tempfile.TemporaryDirectory() as other:
        copy = shutil.copytree(folder, Path(other) / "adapter")
        values = json.loads((copy / "adapter_config.json").read_bytes())
        (copy / "adapter_config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
        return models.logits(peft.PeftModel.from_pretrained(models.llama(), copy).double().eval()).float()


def made_by_peft(kind: Callable[..., Any], **settings: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        pickled = settings.pop("pickled", False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = peft.get_peft_model(models.llama(), kind(task_type="CAUSAL_LM", **settings))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.2 * torch.randn_like(parameter)
            model.save_pretrained(folder, safe_serialization=not pickled)
        (folder / "README.md").unlink(missing_ok=True)

    return make


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": reparam.LoRA(r=2, alpha=4, rank_pattern={"up_proj": 3})},
    "lora whole": {"method": reparam.LoRA(r=2), "modules_to_save": ["lm_head", "norm"], "targets": ["embed_tokens"]},
    "dora": {"method": reparam.DoRA(r=2, alpha=4)},
    "adalora": {"method": reparam.AdaLoRA(target_r=2, init_r=3)},
    "intrinsic": {"method": reparam.Intrinsic(d=9)},
    "full": {"method": reparam.Full()},
    "bitfit": {"method": reparam.BitFit(create=True), "targets": "all-linear"},
    "bottleneck": {"method": reparam.Bottleneck(), "targets": ["down_proj"]},
    "hydralora": {"method": reparam.HydraLoRA(n=3, r=2, dropout=0.0)},
}
for _name, _settings in METHODS.items():
    KINDS[_name] = Kind(saved("reparam", **_settings), loaded, signed=True)
for _name in ("lora", "dora", "adalora"):
    KINDS[f"{_name} for peft"] = Kind(saved("peft", **METHODS[_name]), loaded, by_peft)
PEFT: dict[str, dict[str, Any]] = {
    "peft lora": {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2},
                  "alpha_pattern": {"q_proj": 5}, "modules_to_save": ["norm"], "use_rslora": True},
    "peft regex": {"r": 2, "target_modules": r".*\.(q|v)_proj", "bias": "lora_only", "layers_to_transform": None},
    "peft layers": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "peft dora": {"r": 2, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "peft pickle": {"r": 2, "target_modules": ["q_proj"], "pickled": True},
}  # fmt: skip
for _name, _settings in PEFT.items():
    KINDS[_name] = Kind(made_by_peft(peft.LoraConfig, **_settings), loaded, by_peft)


def prompted(folder: Path) -> Tensor:
    return models.logits(prompts.load(models.llama(), folder).model)


def prompted_by_peft(folder: Path) -> Tensor:
    return models.logits(peft.PeftModel.from_pretrained(models.llama(), str(folder)).eval())[:, -models.IDS.shape[1] :]


KINDS["prefix"] = Kind(made_by_peft(peft.PrefixTuningConfig, num_virtual_tokens=3), prompted, prompted_by_peft)
KINDS["prompt"] = Kind(made_by_peft(peft.PromptTuningConfig, num_virtual_tokens=3), prompted, prompted_by_peft)


# ---- bases


def base(folder: Path) -> tuple[Tensor, list[int]]:
    model, tokenizer = load_base(str(folder)), load_tokenizer(str(folder))
    return models.logits(model, IDS), tokenizer(TEXT)["input_ids"]


def stock(folder: Path) -> tuple[Tensor, list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return models.logits(AutoModelForCausalLM.from_pretrained(folder).eval(), IDS), tokenizer(TEXT)["input_ids"]


def stock_of(dense: Callable[[], dict[str, Tensor]]) -> Callable[[Path], Any]:
    """The judge of a folder whose quantized tensors are intact: a dense model of its configuration."""

    def judge(folder: Path) -> Any:
        config = AutoConfig.from_pretrained(folder)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        held = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
        state = dense()
        model.load_state_dict(state | {k: v for k, v in held.items() if k in state and v.is_floating_point()})
        return models.logits(model.eval(), IDS), AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]

    return judge


def plain(folder: Path) -> None:
    models.save_base(folder, tie_word_embeddings=True)


def sharded(folder: Path) -> None:
    models.save_base(folder, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="300KB")


def quantized(storage: str, format: str = "reparam") -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        source = folder.with_name(folder.name + " source")
        plain(source)
        model = load_base(str(source))
        reparam.quantize(model, storage)
        save_model(model, load_tokenizer(str(source)), folder, format=format)

    return make


def dense_of(storage: str) -> Callable[[], dict[str, Tensor]]:
    """The dense tensors of `quantized(storage)`."""

    @functools.cache
    def dense() -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            plain(Path(folder))
            model: Any = AutoModelForCausalLM.from_pretrained(folder)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        reparam.quantize(model, storage)
        for path, module in model.named_modules():
            if f"{path}.weight" in state and hasattr(module, "frozen"):
                state[f"{path}.weight"] = module.frozen.dense()
        return state

    return dense


KINDS["base"] = Kind(plain, base, stock)
KINDS["shards"] = Kind(sharded, base, stock)
KINDS["nf4"] = Kind(quantized("nf4"), base, stock_of(dense_of("nf4")))
KINDS["int8"] = Kind(quantized("int8"), base, stock_of(dense_of("int8")))
KINDS["bitsandbytes"] = Kind(quantized("nf4", "bitsandbytes"), base, stock_of(dense_of("nf4")))
