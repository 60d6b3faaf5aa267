"""Stacked experts in quantized models: while transformers reads them, in files, and under adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import frozen, logits, same
from moe import build
from safetensors.torch import load_file

import reparam


def make(kind: str) -> Any:
    return build(kind, num_hidden_layers=1)


@pytest.mark.parametrize("config", [reparam.NF4Config(), reparam.Int8Config()], ids=["nf4", "int8"])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_quantized_on_loading_written_and_read_back(kind: str, config: Any, tmp_path: Path) -> None:
    model = make(kind)
    model.save_pretrained(tmp_path / "base")
    reparam.quantize(model, config.storage)
    y = logits(model)
    loaded = type(model).from_pretrained(tmp_path / "base", quantization_config=config).eval()
    assert torch.equal(logits(loaded), y)
    assert same(frozen(loaded), frozen(model))
    total = sum(site.entries for site in loaded.hf_quantizer.report.sites)
    assert total >= 0.99 * (total + sum(p.numel() for n, p in loaded.named_parameters() if p.ndim == 3))
    for name, written in (("loaded", loaded), ("quantized", model)):
        written.save_pretrained(tmp_path / name)
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / name).eval()), y)
    keys = [key for key in load_file(tmp_path / "loaded" / "model.safetensors") if ".experts." in key]
    assert any(key.endswith("experts.3.gate_up_proj.packed.weight") for key in keys)


def test_an_adapter_on_quantized_experts_is_saved_merged_and_fits_the_dense_base(tmp_path: Path) -> None:
    model = make("Qwen3Moe")
    reparam.quantize(model, "nf4")
    adapter = reparam.attach(model, reparam.LoRA(r=2))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    y = logits(model)
    model(torch.arange(3, 20)[None]).logits.square().mean().backward()
    assert sum(p.grad is not None for p in adapter.parameters()) > 20
    adapter.save(tmp_path / "a")
    dense = make("Qwen3Moe")
    own = reparam.load(dense, tmp_path / "a")
    for name, tensor in own.tensors().items():
        assert torch.equal(tensor, adapter.tensors()[name])
    report = reparam.merge(model, keep_base=True)
    assert torch.allclose(logits(model), y, atol=1e-4)
    assert str(model) == str(make("Qwen3Moe"))
    report.restore()
    assert torch.equal(logits(model), y)
    reparam.merge(model, into="nf4", force=True)
    assert model.config.quantization_config["storage"] == "nf4"
    reparam.quantize(model, "dense")
    assert str(model) == str(make("Qwen3Moe"))


def test_damaged_or_wrong_stacks_are_refused_by_name(tmp_path: Path) -> None:
    model = make("GptOss")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2, 3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.2\.down_proj"):
        type(model).from_pretrained(tmp_path, quantization_config=reparam.NF4Config())
