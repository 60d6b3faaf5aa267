"""Check that a model that transformers loaded is the one in the files: complete, of finite numbers, without damage."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from reparam.core.checks import listed
from reparam.core.memory import lacks_memory
from reparam.errors import BaseError, ReparamError

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


def check_complete(info: Mapping[str, Any]) -> None:
    """Raise ValueError for parameters that the files lack, or hold in another shape; they would be random numbers.

    `info` is what transformers returns beside the model. Tied weights, and those that the model's class declares as
    optional, are not in it.
    """
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [
        f"{name} is {list(found)} in the files, but {list(wanted)} in the model"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    if problems:
        raise ValueError(
            f"{listed(problems)}; transformers would fill this with random numbers, so use the folder of a complete "
            "causal language model"
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
    """The first line of the error with text, for the end of a sentence."""
    if isinstance(error, ReparamError):
        return str(error)
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    text = lines[0][:300] if lines else ""
    plain = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return text if plain and text else f"{type(error).__name__}: {text}".rstrip(": ")
