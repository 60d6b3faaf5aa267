"""Models with accelerate's hooks (device maps, offloading): an adapter computes there as on a plain model.

The judge is the same model without hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from models import IDS, gpt2, llama, logits, tied_llama
from safetensors.torch import load_file
from selecting import change
from torch import nn

import reparam

CPU = torch.device("cpu")
SITES = ["model.layers.0.self_attn.q_proj", "down_proj"]


def by_map(model: Any, folder: Path) -> Any:
    places: dict[str, Any] = {"model.layers.0": "disk", "lm_head": "disk"}
    places |= dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb"), "cpu")
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu_offload": lambda model, folder: cpu_offload(model, CPU) or model,
    "disk_offload": lambda model, folder: disk_offload(model, folder, CPU) or model,
    "dispatch_model": by_map,
    "one device": lambda model, folder: dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True),
}


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds", "ignore:DoRA. the rank exceeds")
@pytest.mark.parametrize("method", [reparam.LoRA(r=2), reparam.DoRA(r=2), reparam.Full()], ids=lambda m: m.name)
def test_an_adapter_on_a_model_with_hooks(how: str, method: Any, tmp_path: Path) -> None:
    plain, model = llama(attention_bias=True), OFFLOADS[how](llama(attention_bias=True), tmp_path / "parts")
    before = logits(plain)
    held = {name: parameter.device for name, parameter in model.named_parameters()}
    for one in (plain, model):
        change(reparam.attach(one, method, targets=[*SITES, "embed_tokens", "model.norm"], bias=True), 1)
        change(reparam.attach(one, method, targets=["q_proj"], name="other"), 2)
        reparam.select(one, "default")
    wanted = logits(plain)
    assert torch.equal(logits(model), wanted)
    assert not torch.allclose(wanted, before)
    assert {name: parameter.device for name, parameter in model.named_parameters() if name in held} == held

    gradients = []
    for one in (plain, model):
        adapter = reparam.adapters(one)["default"].requires_grad_()
        one(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    rows = ["default", "other", None]
    mixed = []
    for one in (plain, model):
        with reparam.select(one, rows):
            mixed.append(logits(one))
    assert torch.equal(*mixed)

    reparam.adapters(plain)["default"].save(tmp_path / "a")
    reparam.adapters(model)["default"].save(tmp_path / "b")
    files = [load_file(tmp_path / name / "adapter.safetensors") for name in "ab"]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    reparam.load(model, tmp_path / "a", name="again")  # the digests of the base agree
    assert torch.equal(logits(model), wanted)
    for name in ("default", "other", "again"):
        reparam.remove(model, name)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("how", OFFLOADS)
def test_hooks_that_come_after_the_adapter(how: str, tmp_path: Path) -> None:
    model = llama()
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=SITES)
    change(adapter, 1)
    wanted = logits(model)
    reparam.remove(model, "default")
    OFFLOADS[how](model, tmp_path / "parts")
    change(reparam.attach(model, reparam.LoRA(r=2), targets=SITES), 1)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), wanted)  # accelerate's own removal, beneath the adapter
    plain = llama()
    change(reparam.attach(plain, reparam.LoRA(r=2), targets=SITES), 1)
    if how != "dispatch_model":  # accelerate wants the device of every tensor, also of the description of adapters
        OFFLOADS[how](plain, tmp_path / "more")
        assert torch.equal(logits(plain), wanted)
        remove_hook_from_submodules(plain)
        assert torch.equal(logits(plain), wanted)


LATER: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (reparam.LoRA(r=2), {"targets": [*SITES, "embed_tokens", "model.norm"], "bias": True}),
    "dora": (reparam.DoRA(r=2), {"targets": [*SITES, "embed_tokens"]}),
    "intrinsic": (reparam.Intrinsic(d=8), {"targets": SITES}),
    "full": (reparam.Full(), {"targets": [*SITES, "embed_tokens", "model.norm"]}),
    "mixture": (reparam.MoLoRA(n=2, r=2), {"targets": SITES}),
}


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
@pytest.mark.parametrize("method", LATER)
@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds", "ignore:DoRA. the rank exceeds")
def test_an_adapter_stays_when_its_model_is_offloaded(how: str, method: str, tmp_path: Path) -> None:
    """It computes, trains with the optimizer of before, is in mixed batches and is saved as without hooks."""
    found = []
    for offloaded in (False, True):
        model = llama(attention_bias=True)
        adapter = reparam.attach(model, LATER[method][0], **LATER[method][1])
        change(adapter, 1)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        if offloaded:
            OFFLOADS[how](model, tmp_path / "parts")
            assert model.model.layers[1].mlp.down_proj.weight.is_meta
        outputs = [logits(model)]
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        outputs.append(logits(model))
        if method != "mixture":
            with reparam.select(model, ["default", None, "default"]):
                outputs.append(logits(model))
        adapter.save(tmp_path / str(offloaded))
        remove_hook_from_submodules(model)
        found.append([*outputs, logits(model), *load_file(tmp_path / str(offloaded) / "adapter.safetensors").values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][1])


def test_an_offload_that_takes_the_place_of_another() -> None:
    model = llama()
    change(reparam.attach(model, reparam.DoRA(r=2), targets=SITES), 1)
    wanted = logits(model)
    update = reparam.adapters(model)["default"].updates[f"{SITES[0]}"]
    for _ in range(2):
        add_hook_to_module(update, AlignDevicesHook(CPU, offload=True))
    cpu_offload(model, CPU)
    assert torch.equal(logits(model), wanted)


def test_what_an_offloaded_module_that_trains_whole_cannot_do() -> None:
    model = llama()
    change(reparam.attach(model, reparam.LoRA(r=2), targets=SITES, modules_to_save=["lm_head"]), 1)
    wanted = logits(model)
    cpu_offload(model, CPU)
    assert torch.equal(logits(model), wanted)
    with pytest.raises(ValueError, match="accelerate offloaded modules that the adapter trains whole, so there is"):
        reparam.adapters(model)["default"].save("never")
    with pytest.raises(ValueError, match=r"offload a model before you attach to it"):
        reparam.select(model, ["default"])


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_what_would_lose_a_weight_is_refused(how: str, tmp_path: Path) -> None:
    model = OFFLOADS[how](llama(), tmp_path)
    before = logits(model)
    with pytest.raises(ValueError, match=r"quantize: accelerate offloads the weights of model.layers.0.self_attn.q_pr"):
        reparam.quantize(model, "int8", targets=SITES)
    with pytest.raises(ValueError, match="lm_head cannot be trained whole: accelerate offloads its weights"):
        reparam.attach(model, reparam.LoRA(r=2), targets=SITES, modules_to_save=["lm_head"])
    change(reparam.attach(model, reparam.LoRA(r=2), targets=SITES), 1)
    after = logits(model)
    with pytest.raises(ValueError, match=r"merge: accelerate offloads the weights of .* without offloading"):
        reparam.merge(model)
    assert torch.equal(logits(model), after)
    reparam.remove(model, "default")
    assert torch.equal(logits(model), before)


def test_hooks_without_offloading_take_part_in_everything(tmp_path: Path) -> None:
    plain, model = gpt2(), dispatch_model(gpt2(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    for one in (plain, model):
        change(reparam.attach(one, reparam.LoRA(r=2), targets=["c_attn", "wte"], modules_to_save=["lm_head"]), 1)
    assert torch.equal(logits(model), logits(plain))
    for one in (plain, model):
        reparam.merge(one)
    assert torch.equal(logits(model), logits(plain))
    assert all("_hf_hook" in vars(block.attn.c_attn) for block in model.transformer.h)
    for one in (plain, model):
        reparam.quantize(one, "int8", targets=["c_fc"])
    assert torch.equal(logits(model), logits(plain))
    seen: list[Any] = []
    hook = model.transformer.h[0].mlp.c_fc._hf_hook
    own = hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: (seen.append(module), own(module, *args, **kwargs))[1]
    logits(model)
    assert seen == [model.transformer.h[0].mlp.c_fc]


def test_a_hook_on_a_block_that_offloads_all_in_it() -> None:
    model = llama()
    block = model.model.layers[0]
    values = {name: p.detach().clone() for name, p in block.named_parameters()}
    add_hook_to_module(block, AlignDevicesHook(CPU, offload=True, weights_map=values, place_submodules=True))
    before = logits(model)
    with pytest.raises(ValueError, match=r"self_attn.q_proj: accelerate's hook on model.layers.0 offloads the weights"):
        reparam.attach(model, reparam.LoRA(r=2), targets=["q_proj"])
    assert torch.equal(logits(model), before)
    change(reparam.attach(model, reparam.LoRA(r=2), targets=["re:.*layers.1.*q_proj"]), 1)
    assert not torch.equal(logits(model), before)


def test_tied_weights_are_not_taken_for_separate_ones() -> None:
    model = tied_llama()
    cpu_offload(model, CPU)
    with pytest.raises(ValueError, match="lm_head: its weight is tied and accelerate offloads it"):
        reparam.attach(model, reparam.LoRA(r=2), targets=["lm_head"])


def test_a_forward_that_something_else_patched_is_refused() -> None:
    """A copy of it would compute with the original, so that training would do nothing."""
    holder = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    inner = holder[1][0]  # type: ignore[index]
    inner.forward = type(inner).forward.__get__(nn.Linear(2, 2))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="1 cannot be trained whole: the forward of this Sequential or of a module"):
        reparam.attach(holder, reparam.LoRA(r=1), targets=["re:0"], modules_to_save=["1"])
