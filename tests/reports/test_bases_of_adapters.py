"""Adapters on a base without values, and on another base than their files name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import llama, logits
from transformers import AutoModelForCausalLM

import reparam


def on_meta() -> Any:
    with torch.device("meta"):
        return type(llama())(llama().config)


def saved(folder: Path, format: str, **settings: Any) -> Path:
    reparam.attach(llama(), "lora", r=2, **settings).save(folder, format=format)
    return folder


@pytest.mark.parametrize("check_base", [True, False])
@pytest.mark.parametrize("format", ["reparam", "peft"])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"targets": ["embed_tokens"]}], ids=str)
def test_a_base_on_meta_is_refused(format: str, check_base: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", format, **settings)
    model = on_meta()
    with pytest.raises(reparam.FormatError, match=r"device 'meta' .*would be lost"):
        reparam.load(model, folder, check_base=check_base)
    assert not hasattr(model, "reparam_state")


def test_only_the_changed_modules_must_have_values(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", "peft", targets=["q_proj"])
    model = llama()
    model.model.layers[1].mlp.to("meta")
    adapter = reparam.load(model, folder)
    assert all(not tensor.is_meta for tensor in adapter.tensors().values())
    model = llama()
    model.model.layers[1].self_attn.q_proj.to("meta")
    with pytest.raises(reparam.FormatError, match=r"layers\.1\.self_attn\.q_proj"):
        reparam.load(model, folder)


def test_an_adapter_on_meta_is_not_saved(tmp_path: Path) -> None:
    adapter = reparam.attach(on_meta(), "lora", r=2)
    with pytest.raises(ValueError, match=r"on the device 'meta' .*nothing to save"):
        adapter.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def warned(model: Any, folder: Path, **how: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        reparam.load(model, folder, **how)
    return [str(one.message) for one in found if "made for the base" in str(one.message)]


def base(folder: Path) -> Any:
    if not folder.exists():
        llama().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_another_base_than_the_files_name(tmp_path: Path) -> None:
    peft.get_peft_model(base(tmp_path / "one"), peft.LoraConfig()).save_pretrained(str(tmp_path / "adapter"))
    assert warned(base(tmp_path / "one"), tmp_path / "adapter") == []
    (message,) = warned(base(tmp_path / "two"), tmp_path / "adapter")
    for word in (str(tmp_path / "adapter"), str(tmp_path / "one"), str(tmp_path / "two")):
        assert word in message
    assert warned(base(tmp_path / "two"), tmp_path / "adapter", check_base=False) == []
    assert warned(llama(), tmp_path / "adapter") == []  # a model that was built from a configuration has no name


@pytest.mark.parametrize(
    ("named", "used", "same"),
    [
        ("org/base", "org/base", True),
        ("org/base", "Org/Base", True),
        ("org/base", "/models/base", True),
        ("org/base", "/cache/models--org--base/snapshots/0123/", True),
        ("/elsewhere/base", "/models/base", True),
        ("org/base", "other/base", False),
        ("org/base", "org/base-it", False),
        ("org/base", "/models/base-it", False),
        ("org/base", "/cache/models--other--base/snapshots/0123", False),
    ],
)
def test_a_copy_of_the_named_base_needs_no_warning(named: str, used: str, same: bool, tmp_path: Path) -> None:
    model = llama()
    model.name_or_path = named
    model.config._name_or_path = named
    peft.get_peft_model(model, peft.LoraConfig()).save_pretrained(str(tmp_path / "adapter"))
    model = llama()
    model.config._name_or_path = used
    assert bool(warned(model, tmp_path / "adapter")) is not same
    assert logits(model).isfinite().all()
