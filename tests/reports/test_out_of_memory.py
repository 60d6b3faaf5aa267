"""A lack of memory ends a command with one sentence: what was asked for, and the settings that lower it."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from command import reparam, train

from reparam.core.memory import lacks_memory, memory_sentence

MIB = 2**20
SETTINGS = ("batch size", "max_length", "nf4", "gradient_checkpointing")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let this process take 200 MiB more than it has, with all that the commands import."""
    for module in ("datasets", "transformers.trainer", "reparam.train.trainer", "reparam.evaluation.evaluate"):
        import_module(module)
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 200 * MIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def long_rows(tmp_path: Path) -> str:
    """A text for each row, so that nothing is generated; a full batch has an attention mask of 256 MiB."""
    file = tmp_path / "long.jsonl"
    file.write_text((json.dumps({"text": "a, b, c, d " * 520}) + "\n") * 16)
    return str(file)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of this process from /proc")
@pytest.mark.parametrize("verb", ["eval", "train", "train --plan"])
def test_a_command_says_what_lowers_the_memory(
    verb: str, base: str, long_rows: str, tmp_path: Path, little_memory: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if verb == "eval":
        code = reparam("eval", long_rows, "--base", base, "--batch-size", 64, "--max-length", 2048)
    else:
        code = train(base, long_rows, tmp_path / "out", "--batch_size", 16, "--max_length", 2048, *verb.split()[1:])
    said = capsys.readouterr().err.strip()
    assert code == 1
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("failed:")]
    if "--plan" in verb:
        assert "the plan for 16 x 2048 tokens is" in line
        assert all(
            word in line for word in ("with run.gradient_checkpointing true, it is", "run.batch_size 8", "iB were held")
        )
    else:
        assert all(word in line for word in SETTINGS)
    assert "not enough memory for another" in line
    assert "iB;" in line


ERRORS: list[Callable[[], object]] = [
    lambda: torch.empty(10**15),
    lambda: np.ones(10**15),
    lambda: bytearray(10**15),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")),
    lambda: (_ for _ in ()).throw(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")),
    lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")),
    lambda: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")),
]


@pytest.mark.parametrize("fail", ERRORS)
def test_every_kind_of_error_is_recognized(fail: Callable[[], object]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (of many types)
        fail()
    assert lacks_memory(caught.value)
    assert all(word in memory_sentence(caught.value) for word in SETTINGS)


def test_the_sentence_has_the_amount() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**12)
    assert memory_sentence(caught.value).startswith("not enough memory for another 3,725.3 GiB; ")
    told = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79")
    assert memory_sentence(told).startswith("not enough memory on the GPU for another 2.50 GiB; ")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(5, "no"), ValueError("out of memory")])
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert not lacks_memory(error)
