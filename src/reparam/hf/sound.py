"""Check that a model that transformers loaded is the one in the files: complete, of finite numbers, without damage."""

from __future__ import annotations

import contextlib
import logging
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from reparam.core.checks import listed
from reparam.core.memory import lacks_memory
from reparam.errors import BaseError, ReparamError

_SCALES = ("weight_scale", "weight_scale_inv", "weight_scales", "scales", "qzeros", "SCB")  # of other libraries
MOST = 10_000  # modules of one kind
_COUNTS = re.compile(r"(layers?|experts|blocks|depth)$")
_LOADER = logging.getLogger("transformers.modeling_utils")


@contextlib.contextmanager
def from_files(path: str, what: str) -> Iterator[None]:
    """Turn any error that damaged files cause into a BaseError of one sentence, with the name of the folder.

    `what` is what is loaded: "causal language model" or "tokenizer". Errors of this package keep their text. A lack of
    memory and interrupts stay as they are.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, BaseError):
        raise
    except BaseException as error:  # tokenizers and safetensors raise many kinds, and panics of Rust are no Exception
        if lacks_memory(error):
            raise
        raise BaseError(f"{path}: no {what} could be loaded: {_sentence(error)}") from error


@contextlib.contextmanager
def report_held() -> Iterator[list[logging.LogRecord]]:
    """Hold back the table in which transformers logs what is missing, mismatched or not used."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        report = "LOAD REPORT" in record.getMessage()
        if report:
            held.append(record)
        return not report

    _LOADER.addFilter(hold)
    try:
        yield held
    finally:
        _LOADER.removeFilter(hold)


def check_config(config: Any) -> None:
    """Raise ValueError for a configuration that transformers would load wrongly, or never finish to load.

    That is a quantization that it does not know, which it would skip, and take the numbers of quantized matrices for
    those of dense ones; and a number of layers or experts that would keep the constructor of the model busy for ever.
    """
    entry = getattr(config, "quantization_config", None)
    told = entry.get("quant_method") if isinstance(entry, dict) else None
    usual = isinstance(entry, dict) and (entry.get("load_in_4bit") is True or entry.get("load_in_8bit") is True)
    if entry is not None and not usual and not (isinstance(told, str) and told in AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise ValueError(
            "config.json: quantization_config: expected an object with a quant_method that transformers knows, found "
            f"{reprlib.repr(entry)}; get the file of the model again"
        )
    for key, value in config.to_dict().items():
        if _COUNTS.search(key) and isinstance(value, int) and value > MOST:
            raise ValueError(f"config.json: {key}: expected at most {MOST:,}, found {value:,}")


def check_complete(info: Mapping[str, Any], what: str) -> None:
    """Raise ValueError for parameters that the files lack, or hold in another shape; they would be random numbers.

    `info` is what transformers returns beside the model, `what` the kind of model. Tied weights, and those that the
    model's class declares as optional, are not in it.
    """
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [
        f"{name} is {list(found)} in the files, but {list(wanted)} in the model"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    if problems:
        raise ValueError(
            f"{listed(problems)}; transformers would fill this with random numbers, so use the folder of a complete "
            f"{what}"
        )


def check_dense(info: Mapping[str, Any], keys: Collection[str]) -> None:
    """Raise ValueError if the files of a model that was loaded as a dense one hold the scales of quantized matrices.

    `info` is what transformers returns beside the model; `keys` are those of the tensors that reparam's storages and
    bitsandbytes write, without the path.
    """
    ends = tuple(f".{key}" for key in {*keys, *_SCALES} - {"weight"})
    scales = sorted(key for key in info["unexpected_keys"] if key.endswith(ends))
    if scales:
        raise ValueError(
            "config.json has no quantization_config, but the matrices are quantized, as these tensors show: "
            f"{listed(scales)}; get the file of the model again"
        )


@torch.no_grad()
def check_finite(model: nn.Module) -> None:
    """Raise ValueError if a parameter holds NaN or infinity."""
    wrong = {name: parameter.dtype for name, parameter in model.named_parameters() if not _finite(parameter)}
    if wrong:
        half = ", or load it as bfloat16 if float16 cannot hold its values" if torch.float16 in wrong.values() else ""
        raise ValueError(
            f"NaN or infinity in {listed(list(wrong))}, which would reach its outputs; get the files of the model "
            f"again{half}"
        )


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    wide = tensor if tensor.itemsize > 1 else tensor.float()
    low, high = torch.aminmax(wide)  # one pass without a copy; NaN passes through
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _sentence(error: BaseException) -> str:
    """The first line of the error that says what is wrong, for the end of a sentence."""
    if isinstance(error, ReparamError):
        return str(error)
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    first = next((i for i, line in enumerate(lines) if not line.endswith(":")), 0)  # the lines before introduce it
    text = " ".join(lines[: first + 1])[:300]
    if isinstance(error, TypeError | AttributeError | KeyError):
        return f"a value in its JSON files is missing or of a wrong type: {type(error).__name__}: {text}".rstrip(": ")
    plain = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return text if plain and text else f"{type(error).__name__}: {text}".rstrip(": ")
