"""The adapters of mlx-lm, in a closed form, and files of diffusers, which are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import assert_equal_but_for_rounding
from models import llama, logits
from safetensors.torch import load_file, save_file
from torch import Tensor

import reparam

SITES = ["self_attn.q_proj", "mlp.down_proj"]
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


@torch.no_grad()
def saved(folder: Path, *, layers: tuple[int, ...] = (0, 1), dora: bool = False, more: bool = False) -> Any:
    """Write a folder as mlx-lm does, and return the base with the same change in its weights."""
    generator = torch.Generator().manual_seed(4)
    model, tensors, scale = llama(), {}, 3.5
    paths = [f"model.layers.{layer}.{site}" for layer in layers for site in SITES]
    for path in [*paths, *(["model.embed_tokens", "lm_head"] if more else [])]:
        weight = model.get_submodule(path).weight
        rows, columns = weight.shape
        sizes = (rows, columns) if path.endswith("embed_tokens") else (columns, rows)
        a, b = 0.1 * torch.randn(sizes[0], 2, generator=generator), torch.randn(2, sizes[1], generator=generator)
        tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        change = scale * (a @ b) if path.endswith("embed_tokens") else scale * (a @ b).T
        new = weight.double() + change.double()
        if dora:
            tensors[f"{path}.m"] = weight.norm(dim=1) * (1 + 0.1 * torch.rand(rows, generator=generator))
            new = tensors[f"{path}.m"].double()[:, None] * new / new.norm(dim=1, keepdim=True)
        weight.copy_(new)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": len(layers),
        "model": "",
        "lora_parameters": {"rank": 2, "scale": scale, "dropout": 0.0},
        "iters": 100,
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return model


def edit(folder: Path, **changes: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **changes}))


def tensors(folder: Path, **changes: Tensor | None) -> None:
    found = {**load_file(folder / WEIGHTS), **changes}
    save_file({key: t.contiguous() for key, t in found.items() if t is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(
    "how", [{}, {"layers": (1,)}, {"dora": True}, {"more": True}, {"layers": (1,), "dora": True}], ids=str
)
def test_outputs_are_those_of_mlx(how: dict[str, Any], tmp_path: Path) -> None:
    expected = saved(tmp_path / "mlx", **how)
    model = llama()
    before = logits(model)
    adapter = reparam.load(model, tmp_path / "mlx")
    assert_equal_but_for_rounding(logits(model), logits(expected))
    assert (logits(model) - before).abs().max() > 0.1
    adapter.save(tmp_path / "peft", format="peft")
    again = llama()
    reparam.load(again, tmp_path / "peft")
    assert_equal_but_for_rounding(logits(again), logits(expected))


@pytest.mark.parametrize("count", [-1, 0, 2, 9])
def test_num_layers_of_the_whole_model(count: int, tmp_path: Path) -> None:
    expected = saved(tmp_path / "mlx")
    edit(tmp_path / "mlx", num_layers=count)
    model = llama()
    reparam.load(model, tmp_path / "mlx")
    assert_equal_but_for_rounding(logits(model), logits(expected))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type 'full' of mlx-lm is not supported"),
        ({"num_layers": 1}, "num_layers is 1, but adapters.safetensors has factors for 2 layers"),
        ({"num_layers": "2"}, "num_layers: expected a whole number"),
        ({"lora_parameters": {"rank": 4, "scale": 1.0}}, "do not have the rank 4 of lora_parameters"),
        ({"lora_parameters": {"rank": 2}}, "lora_parameters: scale: missing"),
        ({"lora_parameters": {"rank": 2, "scale": -1.0}}, "alpha=-1.0"),
        ({"lora_parameters": None}, "expected an object with rank, scale and dropout"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    saved(tmp_path / "mlx")
    edit(tmp_path / "mlx", **changes)
    with pytest.raises(reparam.FormatError) as caught:
        reparam.load(llama(), tmp_path / "mlx")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.layers.0.self_attn.q_proj.lora_b": None}, "expected lora_a, lora_b, found lora_a"),
        ({"a.lora_a": torch.zeros(4, 2, 8), "a.lora_b": torch.zeros(4, 8, 2)}, "factors of fused experts"),
        ({"a.lora_a_scales": torch.zeros(2)}, "quantized factors are not supported"),
        ({"model.norm.weight": torch.zeros(2)}, "unknown tensor model.norm.weight"),
        ({"model.layers.0.self_attn.q_proj.lora_a": torch.full((32, 2), torch.nan)}, "NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    saved(tmp_path / "mlx")
    tensors(tmp_path / "mlx", **changes)
    with pytest.raises(reparam.FormatError) as caught:
        reparam.load(llama(), tmp_path / "mlx")
    assert words in str(caught.value)


def test_a_layer_is_missing(tmp_path: Path) -> None:
    saved(tmp_path / "mlx", layers=(0,))
    edit(tmp_path / "mlx", num_layers=2)
    with pytest.raises(reparam.FormatError, match=r"settings name modules without tensors: model\.layers\.1\."):
        reparam.load(llama(), tmp_path / "mlx")


def test_the_alpha_of_the_first_releases(tmp_path: Path) -> None:
    saved(tmp_path / "mlx")
    edit(tmp_path / "mlx", lora_parameters={"rank": 2, "scale": 3.5, "alpha": 16, "dropout": 0.0})
    with pytest.warns(UserWarning, match=r"has an alpha, which mlx-lm ignores"):
        reparam.load(llama(), tmp_path / "mlx")


def test_files_of_diffusers_are_named(tmp_path: Path) -> None:
    save_file({"unet.down_blocks.0.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(reparam.FormatError, match="diffusers"):
        reparam.load(llama(), tmp_path)
