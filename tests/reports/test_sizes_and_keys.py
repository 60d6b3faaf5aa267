"""Files that are too large are refused before they are read, keys that occur twice by name; a TOML may have a BOM."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adapters import trained
from command import reparam, train
from models import llama
from safetensors.torch import save_file

import reparam as library
from reparam.data.files.jsonl import LARGEST_LINE
from reparam.data.rows import read_rows
from reparam.errors import BaseError, ConfigError, DataError, FormatError
from reparam.hf.models import load_base, load_tokenizer
from reparam.io import files, native, whole
from reparam.train.config import resolve

GB = 1 << 30


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let the process have at most 1 GB more than now, so that a file that is read whole is an error."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + GB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def sparse(file: Path, size: int, start: bytes = b"") -> None:
    """A file of this size that takes no room on the disk; its middle reads as zeros."""
    file.write_bytes(start)
    os.truncate(file, size)


def header(size: int) -> bytes:
    """The start of a safetensors file with one tensor that fills it."""
    count = size // 4
    for _ in range(3):
        text = json.dumps({"x.A": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
        count = (size - 8 - len(text)) // 4
    text = text.ljust(size - 8 - 4 * json.loads(text)["x.A"]["shape"][0])
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("format", ["reparam", "peft"])
def test_an_adapter(format: str, tmp_path: Path, little_memory: None) -> None:
    trained(llama()).save(tmp_path / "a", format=format)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    for name in names:
        large = 30 * GB if name.endswith(".safetensors") else 3 * GB
        for start in (b"", header(large)) if name.endswith(".safetensors") else (b"", b'{"r": 8} '):
            shutil.copytree(tmp_path / "a", tmp_path / "large", dirs_exist_ok=True)
            sparse(tmp_path / "large" / name, large, start)
            with pytest.raises(FormatError, match=name):
                files.read(tmp_path / "large")
            assert reparam("inspect", tmp_path / "large") == 2
        shutil.copy(tmp_path / "a" / name, tmp_path / "large" / name)


def test_more_than_the_memory_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the adapter's own settings would allow such a size."""
    trained(llama()).save(tmp_path / "a")
    monkeypatch.setattr(native, "physical_memory", lambda: 1000)
    with pytest.raises(FormatError, match=r"more than the memory of this machine \(1,000 bytes\)"):
        files.read(tmp_path / "a")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"])
def test_a_base(base: str, name: str, tmp_path: Path, little_memory: None) -> None:
    shutil.copytree(base, tmp_path / "base")
    sparse(tmp_path / "base" / name, 3 * GB)
    for read in (load_base, load_tokenizer):
        with pytest.raises(BaseError, match=rf"{name}: 3,221,225,472 bytes, more than"):
            read(str(tmp_path / "base"))


def test_a_configuration_and_data(base: str, tmp_path: Path, little_memory: None) -> None:
    sparse(tmp_path / "run.toml", 3 * GB)
    with pytest.raises(ConfigError, match=r"run\.toml: 3,221,225,472 bytes, more than"):
        resolve(tmp_path / "run.toml", {})
    assert reparam("compare", tmp_path / "run.toml") == 2
    for name, start in (("rows.jsonl", b""), ("rows.txt", b'{"text": "a"}\n')):
        sparse(tmp_path / name, 3 * GB, start)
        with pytest.raises(DataError, match="a line of more than"):
            read_rows(tmp_path / name)
    os.truncate(tmp_path / "rows.jsonl", LARGEST_LINE + 2)  # training also reads the whole file for its digest
    assert train(base, str(tmp_path / "rows.jsonl"), tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_the_adapters_in_a_whole_model(tmp_path: Path) -> None:
    text = json.dumps({whole.ENTRY: {"dtype": "U8", "shape": [3 * GB], "data_offsets": [0, 3 * GB]}}).encode()
    sparse(tmp_path / whole.SINGLE, 8 + len(text) + 3 * GB, len(text).to_bytes(8, "little") + text)
    with pytest.raises(FormatError, match=r"reparam\.adapters is \[3221225472\], expected at most"):
        files.read(tmp_path)


# ---- keys that occur twice


def twice(file: Path, key: str) -> None:
    """Put a second entry with this key in front of the first one."""
    text = file.read_text()
    assert f'"{key}"' in text
    file.write_text(text.replace("{", f'{{"{key}": 1, ', 1))


@pytest.mark.parametrize("format", ["reparam", "peft"])
def test_twice_in_an_adapter(format: str, tmp_path: Path) -> None:
    trained(llama()).save(tmp_path / "a", format=format)
    config, key = ("adapter.json", "method") if format == "reparam" else ("adapter_config.json", "r")
    twice(tmp_path / "a" / config, key)
    with pytest.raises(FormatError, match=f"the key '{key}' occurs twice"):
        library.load(llama(), tmp_path / "a")


def test_twice_in_the_header_of_a_weights_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entry = content[8 : 8 + size].rstrip()[1:-1]
    text = b"{" + entry + b"," + entry + b"}"
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(FormatError, match="the key 'a' occurs twice"):
        native.read_bytes(file)


@pytest.mark.parametrize(("name", "key"), [("config.json", "hidden_size"), ("generation_config.json", "eos_token_id")])
def test_twice_in_a_base(base: str, name: str, key: str, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    twice(tmp_path / "base" / name, key)
    with pytest.raises(BaseError, match=f"{name}: the key '{key}' occurs twice"):
        load_base(str(tmp_path / "base"))


def test_twice_in_rows_and_settings(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "a", "text": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the key 'text' occurs twice"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "completion": "b", "prompt": "c"}]')
    with pytest.raises(DataError, match="the key 'prompt' occurs twice"):
        read_rows(tmp_path / "rows.json")
    with pytest.raises(ConfigError, match="the key 'q_proj' occurs twice"):
        resolve(None, {"method.rank_pattern": '{"q_proj": 2, "q_proj": 4}'})
    (tmp_path / "run.toml").write_text("[run]\nseed = 1\nseed = 2\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        resolve(tmp_path / "run.toml", {})


# ---- TOML


def test_a_byte_order_mark(tmp_path: Path) -> None:
    for start in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "run.toml").write_bytes(start + "[run]\nseed = 7\noutput = 'möglich'\n".encode())
        found = resolve(tmp_path / "run.toml", {})
        assert (found.run.seed, found.run.output) == (7, "möglich")


def test_what_is_no_toml_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin.toml").write_bytes("[run]\noutput = 'möglich'\n".encode("latin-1"))
    (tmp_path / "wide.toml").write_bytes("[run]\nseed = 1\n".encode("utf-16"))
    for name, why in (
        (".", "is a folder"),
        ("pipe", "not a regular file"),
        ("latin.toml", "byte 0xf6 at offset 17 is not UTF-8"),
        ("wide.toml", "the file is UTF-16; save it as UTF-8"),
        ("none", "no such file"),
    ):
        with pytest.raises(ConfigError, match=why):
            resolve(tmp_path / name, {})


# ---- the folder of a run


def test_load_takes_the_folder_of_a_run(tmp_path: Path) -> None:
    own = trained(llama())
    own.save(tmp_path / "run" / "adapter")
    found = library.load(llama(), tmp_path / "run")
    assert found.tensors().keys() == own.tensors().keys()
    assert all(torch.equal(value, own.tensors()[key]) for key, value in found.tensors().items())
    (tmp_path / "other").mkdir()
    with pytest.raises(FormatError, match="no adapter here"):
        library.load(llama(), tmp_path / "other")
