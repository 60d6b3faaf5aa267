"""A saved quantized model whose packed tensors were damaged is refused; folders without a digest load as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import gpt2, llama, logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sampled import FULL

import reparam
from reparam.errors import BaseError
from reparam.hf.models import load_base, save_model


def by_save_model(model: Any, folder: Path) -> None:
    save_model(model, None, folder)


def by_hand(model: Any, folder: Path) -> None:
    dense = load_base(str(folder.parent / "base"))
    reparam.quantize(dense, next(iter(storages(model))))
    save_model(dense, None, folder)
    assert not hasattr(dense, "hf_quantizer")


def by_transformers(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def as_bitsandbytes(model: Any, folder: Path) -> None:
    save_model(model, None, folder, format="bitsandbytes")


def storages(model: Any) -> set[Any]:
    return {m.frozen.storage for m in model.modules() if hasattr(m, "frozen") and m.frozen.dense_or_none is None}


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return dict(opened.metadata())


WAYS = [by_save_model, by_hand, by_transformers, as_bitsandbytes]
STORAGES = [reparam.NF4(), reparam.NF4(32, double=False), reparam.Int8()]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("way", WAYS)
def test_any_changed_packed_byte_is_refused(way: Callable[[Any, Path], None], storage: Any, tmp_path: Path) -> None:
    if way is as_bitsandbytes and isinstance(storage, reparam.Int8):
        pytest.skip("bitsandbytes cannot read this storage")
    build = (llama, gpt2)[(WAYS.index(way) + STORAGES.index(storage)) % 2]
    build().save_pretrained(tmp_path / "base")
    model = load_base(str(tmp_path / "base"), storage=storage)
    way(model, tmp_path / "q")
    assert torch.equal(logits(load_base(str(tmp_path / "q"))), logits(model))
    file, kept = tmp_path / "q/model.safetensors", metadata(tmp_path / "q")
    sound = load_file(file)
    packed = sorted(key for key in sound if ".weight.absmax" in key or f"{key}.absmax" in sound)
    for key in packed if FULL else [packed[0], packed[len(packed) // 2], packed[-1]]:
        changed = {name: tensor.clone() for name, tensor in sound.items()}
        changed[key].view(-1).view(torch.uint8)[-1] ^= 1
        save_file(changed, file, kept)
        with pytest.raises(BaseError, match=r"damaged|holds NaN") as caught:
            load_base(str(tmp_path / "q"))
        assert "\n" not in str(caught.value)
    save_file(sound, file, {"format": "pt"})  # as earlier releases wrote it
    assert torch.equal(logits(load_base(str(tmp_path / "q"))), logits(model))


def test_a_model_that_was_changed_and_saved_again_has_a_new_digest(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    save_model(load_base(str(tmp_path / "base"), storage=reparam.NF4()), None, tmp_path / "a")
    model = load_base(str(tmp_path / "a"))
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets="q_proj")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    reparam.merge(model)
    model.save_pretrained(tmp_path / "b", max_shard_size="20kB")
    assert torch.equal(logits(load_base(str(tmp_path / "b"))), logits(model))
