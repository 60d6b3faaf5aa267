"""LoRA on experts in PEFT's files, judged by the outputs of PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, logits
from moe import KINDS, build, trained
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import reparam
from reparam.errors import FormatError


def small(kind: str) -> Any:
    return build(kind, num_hidden_layers=2 if kind == "DeepseekV3" else 1)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-5 * expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["all-linear", "experts", "down_proj", "router"])
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_written_files_give_the_same_outputs_in_peft_and_here(kind: str, targets: str, tmp_path: Path) -> None:
    model = small(kind)
    base = logits(model)
    adapter = trained(reparam.attach(model, reparam.LoRA(r=4, alpha=6), targets=targets))
    y = logits(model)
    assert not close(y, base)
    adapter.save(tmp_path, format="peft")
    with torch.no_grad():
        assert close(PeftModel.from_pretrained(small(kind), tmp_path).eval()(IDS).logits, y)
    other = small(kind)
    again = reparam.load(other, tmp_path)
    assert close(logits(other), y)
    assert set(again.sites) == set(adapter.sites)


def test_some_experts_with_ranks_and_scales_of_their_own(tmp_path: Path) -> None:
    model = small("Mixtral")
    method = reparam.LoRA(
        r=4, alpha=6, scaling="rslora", rank_pattern={r"experts\.1\..*": 2}, alpha_pattern={"down_proj": 3}
    )
    adapter = trained(reparam.attach(model, method, targets=["experts.1", "experts.3", "q_proj"]))
    y = logits(model)
    adapter.save(tmp_path, format="peft")
    with torch.no_grad():
        assert close(PeftModel.from_pretrained(small("Mixtral"), tmp_path).eval()(IDS).logits, y)
    other = small("Mixtral")
    reparam.load(other, tmp_path)
    assert close(logits(other), y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("both", [True, False])
def test_folders_of_peft_are_read(kind: str, both: bool, tmp_path: Path) -> None:
    names = ["experts.gate_up_proj", "experts.down_proj"] if both else ["experts.down_proj"]
    attention = ["o_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=attention, target_parameters=names)
    peft = get_peft_model(small(kind), config)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
        y = peft.eval()(IDS).logits
    peft.save_pretrained(tmp_path)
    model = small(kind)
    adapter = reparam.load(model, tmp_path)
    assert close(logits(model), y)
    assert any(".experts." in path for path in adapter.sites)
    reparam.merge(model)
    assert (logits(model) - y).abs().max() < 1e-4 * y.abs().max()


@pytest.mark.parametrize(("kind", "release"), [("Mixtral", "0.18.1"), ("Mixtral", "0.19.0"), ("GptOss", "0.19.0"),
                                               ("Qwen3Moe", "0.18.0")])  # fmt: skip
def test_releases_that_laid_the_factors_out_the_other_way(kind: str, release: str, tmp_path: Path) -> None:
    model = small(kind)
    adapter = trained(reparam.attach(model, reparam.LoRA(r=4), targets="experts"))
    adapter.save(tmp_path, format="peft")
    file = tmp_path / "adapter_model.safetensors"
    turned = {}
    for name, tensor in load_file(file).items():
        count = 4
        if name.endswith("lora_A.weight"):  # A [E·R, I] becomes B' [I, R·E]
            own = tensor.view(count, -1, tensor.shape[1]).permute(2, 1, 0).reshape(tensor.shape[1], -1)
            turned[name.replace("lora_A", "lora_B")] = own.contiguous()
        else:
            own = tensor.view(len(tensor), -1, count).permute(2, 1, 0).reshape(-1, len(tensor))
            turned[name.replace("lora_B", "lora_A")] = own.contiguous()
    save_file(turned, file)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "peft_version": release}))
    other = small(kind)
    reparam.load(other, tmp_path)
    assert close(logits(other), logits(model))


def test_a_square_stack_without_a_release_is_refused(tmp_path: Path) -> None:
    trained(reparam.attach(small("Qwen3Moe"), reparam.LoRA(r=4), targets="experts")).save(tmp_path, format="peft")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    del settings["peft_version"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(FormatError, match="is square, and the file does not tell the release of PEFT"):
        reparam.load(small("Qwen3Moe"), tmp_path)


def test_stacks_of_another_rank_are_refused(tmp_path: Path) -> None:
    trained(reparam.attach(small("Mixtral"), reparam.LoRA(r=4), targets="experts")).save(tmp_path, format="peft")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "r": 3}))
    with pytest.raises(FormatError, match="which is no stack of rank 3"):
        reparam.load(small("Mixtral"), tmp_path)


@pytest.mark.parametrize("method", [reparam.DoRA(r=2), reparam.AdaLoRA(init_r=3, target_r=2)], ids=["dora", "adalora"])
def test_what_peft_cannot_put_on_experts_is_refused(method: Any, tmp_path: Path) -> None:
    adapter = trained(reparam.attach(small("Mixtral"), method, targets="experts"))
    with pytest.raises(FormatError, match=rf"PEFT has no equivalent of {method.name} on an expert"):
        reparam.io.files.write(tmp_path / "a", adapter.record(), format="peft")
    assert not (tmp_path / "a").exists()


def test_dropout_on_experts_is_told(tmp_path: Path) -> None:
    adapter = trained(reparam.attach(small("Mixtral"), reparam.LoRA(r=2, dropout=0.1), targets="experts"))
    with pytest.warns(UserWarning, match="PEFT has no dropout on parameters"):
        adapter.save(tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0
