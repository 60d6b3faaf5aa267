"""Folders that were damaged at random either load with the right results, or are refused with one sentence.

The right results are those of the intact folder or, where the damage is a valid other folder, those of another library:
PEFT and transformers. REPARAM_TESTS=full tries many more copies.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged_folders import KINDS, attempt

from reparam.errors import BaseError, DataError, FormatError
from reparam.hf.models import load_base, load_tokenizer

COPIES = 300 if os.environ.get("REPARAM_TESTS") == "full" else 3


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """The intact folder of a kind, and the results of reading it; each is made once."""
    root, made = tmp_path_factory.mktemp("originals"), {}

    def original(name: str) -> tuple[Path, Any]:
        if name not in made:
            KINDS[name].make(root / name)
            made[name] = root / name, KINDS[name].read(root / name)
        return made[name]

    return original


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.timeout(3000)
def test_damaged_copies(name: str, originals: Any, tmp_path: Path) -> None:
    original, expected = originals(name)
    for seed in range(COPIES):
        done, found = attempt(name, original, tmp_path / "copy", seed, expected)
        assert not found.startswith(("RAW", "WRONG")), f"{name}, seed {seed}: {done}: {found}"


def changed(original: Path, folder: Path, change: Callable[[dict[str, Any]], object], file: str = "config.json") -> str:
    shutil.copytree(original, folder)
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))
    return str(folder)


@pytest.mark.parametrize("name", ["nf4", "int8", "bitsandbytes"])
@pytest.mark.parametrize("value", [None, 1.5, {}, {"quant_method": 1.5}, {"quant_method": "other"}, "x", []])
def test_quantized_matrices_are_not_taken_for_dense_ones(name: str, value: Any, originals: Any, tmp_path: Path) -> None:
    path = changed(originals(name)[0], tmp_path / "copy", lambda config: config.update(quantization_config=value))
    with pytest.raises(BaseError, match="copy: no causal language model"):
        load_base(path)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("num_virtual_tokens", None), ("num_virtual_tokens", [3]), ("num_virtual_tokens", 2**60), ("num_layers", 2**60),
     ("num_transformer_submodules", 1.5), ("token_dim", 8), ("task_type", {}), ("modules_to_save", ["norm"])],
)  # fmt: skip
def test_settings_of_virtual_tokens_are_checked_before_use(
    name: str, key: str, value: Any, originals: Any, tmp_path: Path
) -> None:
    if (name, key) == ("prompt", "num_layers"):
        return  # without effect
    more = {"num_layers": 4} if key == "token_dim" else {}  # of the same size in total
    file = "adapter_config.json"
    path = changed(originals(name)[0], tmp_path / "copy", lambda config: config.update({key: value, **more}), file)
    with pytest.raises(FormatError, match=r"copy.*: "):
        KINDS[name].read(Path(path))


@pytest.mark.parametrize("value", [2**70, 10_001])
def test_a_model_of_endless_layers_is_refused(value: int, originals: Any, tmp_path: Path) -> None:
    path = changed(originals("base")[0], tmp_path / "copy", lambda config: config.update(num_hidden_layers=value))
    with pytest.raises(BaseError, match="num_hidden_layers: expected at most 10,000"):
        load_base(path)


def test_a_tokenizer_that_cannot_encode_is_refused(originals: Any, tmp_path: Path) -> None:
    change = {"model_max_length": "long"}
    path = changed(originals("base")[0], tmp_path / "copy", lambda v: v.update(change), "tokenizer_config.json")
    with pytest.raises(BaseError, match="no tokenizer could be loaded"):
        load_tokenizer(path)


def test_messages_are_lines_of_bounded_length() -> None:
    long = FormatError("a.json: " + "x" * 100_000 + "; get the file again")
    assert len(str(long)) <= 4000
    assert str(long).startswith("a.json: xxx")
    assert str(long).endswith("xxx; get the file again")
    assert str(FormatError("a\nb\x1b[31m\ud800\u202ec é 北")) == "a\\nb\\x1b[31m\\ud800\\u202ec é 北"
    assert str(DataError(["a\nb", "c"])) == "a\\nb\nc"
