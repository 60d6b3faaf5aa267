"""The weights of PEFT folders in the wild: pickles, keys with names, pointers, foreign formats, sizes."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import llama, logits
from safetensors.torch import load_file, save_file
from torch import Tensor

import reparam
from reparam.io import native, peft_weights

WEIGHTS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


def saved(folder: Path, make: Callable[[], Any] = llama, *, safe: bool = True, **config: Any) -> Tensor:
    """Save an adapter with PEFT, with random factors; its logits."""
    torch.manual_seed(0)
    model = peft.get_peft_model(make(), peft.LoraConfig(**{"target_modules": ["q_proj", "up_proj"], "r": 4, **config}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.eval().save_pretrained(str(folder), safe_serialization=safe)
    return logits(model).detach()


def loaded(folder: Path, make: Callable[[], Any] = llama) -> Tensor:
    model = make()
    reparam.load(model, folder)
    return logits(model).detach()


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(reparam.FormatError) as caught:
        reparam.load(llama(), folder)
    for word in (str(folder), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}],
    ids=str,
)
def test_pickled_weights_give_pefts_logits(config: dict[str, Any], tmp_path: Path) -> None:
    expected = saved(tmp_path, **config)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / PICKLE)
    torch.testing.assert_close(loaded(tmp_path), expected, atol=1e-5, rtol=1e-4)


def test_safetensors_come_first(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    (tmp_path / PICKLE).write_bytes(b"damaged")
    torch.testing.assert_close(loaded(tmp_path), expected, atol=1e-5, rtol=1e-4)


class Executed:
    """An object that runs code when a pickle of it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("executed").touch, ())


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_is_refused(legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    monkeypatch.chdir(tmp_path)
    content = {"a": torch.zeros(2), "b": Executed()}
    torch.save(content, tmp_path / PICKLE, _use_new_zipfile_serialization=not legacy)
    refused(tmp_path, PICKLE)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(2)], "expected tensors by key"),
        ({"a": 1}, "not whole dense tensors: a"),
        ({"a": torch.zeros(1).expand(10**9)}, "not whole dense tensors: a"),
        ({"a": torch.eye(2).to_sparse()}, "not whole dense tensors: a"),
        ({}, "holds no tensors"),
    ],
)
def test_a_pickle_of_other_things_is_refused(content: object, words: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(content, tmp_path / PICKLE)
    refused(tmp_path, PICKLE, words)


def test_compressed_and_plain_pickles_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "plain") as one:
        parts = {name: one.read(name) for name in one.namelist()}
    with zipfile.ZipFile(tmp_path / PICKLE, "w", zipfile.ZIP_DEFLATED) as other:
        for name, part in parts.items():
            other.writestr(name, part)
    refused(tmp_path, "compressed")
    (tmp_path / PICKLE).write_bytes(pickle.dumps({"a": 1}))
    refused(tmp_path, "not a complete file of torch.save")
    (tmp_path / PICKLE).write_bytes(b"")
    refused(tmp_path, "empty")


def sparse(file: Path, size: int, start: bytes = b"") -> None:
    with file.open("wb") as opened:
        opened.write(start)
        opened.truncate(size)


def header(**shapes: list[int]) -> bytes:
    at, entries = 0, {}
    for key, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        entries[key] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def test_sizes_are_checked_before_reading(tmp_path: Path) -> None:
    saved(tmp_path)
    sparse(tmp_path / WEIGHTS, 30 << 30)
    refused(tmp_path, WEIGHTS, "bytes")
    start = header(a=[2, 3])
    sparse(tmp_path / WEIGHTS, 12 << 30, start)
    refused(tmp_path, WEIGHTS, f"its header states {len(start) + 24:,} bytes, the file has {12 << 30:,}")
    sparse(tmp_path / WEIGHTS, 12 << 30, (11 << 30).to_bytes(8, "little") + b"{")
    refused(tmp_path, WEIGHTS, "its header claims")
    (tmp_path / WEIGHTS).unlink()
    sparse(tmp_path / PICKLE, peft_weights.LARGEST_PICKLE + 1)
    refused(tmp_path, PICKLE, "more than")


@pytest.mark.parametrize("native_format", [True, False])
def test_large_json_is_refused_before_reading(native_format: bool, tmp_path: Path) -> None:
    saved(tmp_path)
    name = native.CONFIG if native_format else CONFIG
    if native_format:
        (tmp_path / CONFIG).unlink()
    sparse(tmp_path / name, 3 << 30)
    refused(tmp_path, name, "bytes, more than the")


def test_a_key_that_occurs_twice_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "peft")
    text = (tmp_path / "peft" / CONFIG).read_text()
    (tmp_path / "peft" / CONFIG).write_text(text.replace('"r": 4', '"r": 4, "r": 8'))
    refused(tmp_path / "peft", CONFIG, "'r' occurs twice")
    reparam.attach(llama(), "lora", r=1).save(tmp_path / "own")
    text = (tmp_path / "own" / native.CONFIG).read_text()
    (tmp_path / "own" / native.CONFIG).write_text(text.replace('"alpha":', '"alpha": 1, "alpha":', 1))
    refused(tmp_path / "own", native.CONFIG, "'alpha' occurs twice")


@pytest.mark.parametrize("name", [WEIGHTS, PICKLE, CONFIG])
def test_a_pointer_of_git_lfs_is_named(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    if name == PICKLE:
        (tmp_path / WEIGHTS).unlink()
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"
    (tmp_path / name).write_text(text)
    refused(tmp_path, name, "git lfs pull")


def rename(folder: Path, change: Callable[[str], str]) -> None:
    found = load_file(folder / WEIGHTS)
    save_file({change(key): tensor for key, tensor in found.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def named(key: str, name: str) -> str:
    """The key as it is in the state of PEFT's model."""
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        key = key.replace(f".{part}", f".{part}.{name}")
    return key.replace("lm_head.weight", f"lm_head.modules_to_save.{name}.weight")


@pytest.mark.parametrize("name", ["default", "my-task"])
@pytest.mark.parametrize(
    "config",
    [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_names_of_adapters_in_keys(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, **config)
    rename(tmp_path, lambda key: named(key, name))
    torch.testing.assert_close(loaded(tmp_path), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("end", [".weight", ".default.weight", ".default", ""])
def test_keys_of_magnitudes(end: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, use_dora=True)
    rename(tmp_path, lambda key: key.replace("lora_magnitude_vector", f"lora_magnitude_vector{end}"))
    torch.testing.assert_close(loaded(tmp_path), expected, atol=1e-5, rtol=1e-4)


def test_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    rename(tmp_path, lambda key: named(key, "one" if ".0." in key else "two"))
    refused(tmp_path, "several adapters (one; two)")


def test_kohyas_files_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(2, 3)}, tmp_path / WEIGHTS)
    refused(tmp_path, "kohya")


def test_convolutions_are_named(tmp_path: Path) -> None:
    net = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(4, 6, 3), "linear": torch.nn.Linear(4, 4)})
    peft.get_peft_model(net, peft.LoraConfig(target_modules=["conv", "linear"])).save_pretrained(str(tmp_path))
    refused(tmp_path, "base_model.model.conv: factors of a convolution, lora_A [8, 4, 3, 3]", "modules_to_save")


def test_activated_lora_and_dora_on_embeddings_are_named(tmp_path: Path) -> None:
    saved(tmp_path / "a", alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    refused(tmp_path / "a", "alora_invocation_tokens", "Activated LoRA")
    saved(tmp_path / "d", target_modules=["embed_tokens"], use_dora=True)
    refused(tmp_path / "d", "DoRA on an embedding")
