"""Adapted modules keep what users put on them, and show what other code reads of them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from models import IDS, gpt2, llama, t5
from torch import Tensor, nn

import reparam

PATH = "model.layers.0.self_attn.q_proj"


def hooked(model: nn.Module, path: str) -> list[str]:
    """Put hooks of every sort on a module; the list gets a line for each call, in order."""
    seen: list[str] = []
    module = model.get_submodule(path)
    module.register_forward_pre_hook(lambda m, args: seen.append(f"pre {list(args[0].shape)}"))
    module.register_forward_pre_hook(lambda m, a, k: seen.append(f"pre with {sorted(k)}"), with_kwargs=True)
    module.register_forward_hook(lambda m, args, out: seen.append(f"post {list(args[0].shape)} {list(out.shape)}"))
    module.register_forward_hook(lambda m, args, out: out * 2)
    module.register_full_backward_hook(lambda m, gi, go: seen.append(f"back {list(go[0].shape)}"))
    return seen


def go(model: nn.Module) -> Tensor:
    out = model(input_ids=IDS).logits
    out.sum().backward() if out.requires_grad else None
    return out.detach()


@pytest.mark.parametrize("path", [PATH, "model.embed_tokens", "model.norm"])
@pytest.mark.parametrize("how", ["attach", "quantize", "full", "after"])
def test_hooks_fire_as_without_adapters(path: str, how: str) -> None:
    if how == "quantize" and path == "model.norm":
        return
    plain, model = llama(), llama()
    expected = hooked(plain, path)
    found = hooked(model, path) if how != "after" else []
    method = reparam.Full() if how == "full" else reparam.LoRA(r=1)
    if how == "quantize":
        reparam.quantize(model, "int8", targets=path)
    else:
        reparam.attach(model, method, targets=path, name="task")
    if how == "after":
        found = hooked(model, path)
    one, other = go(plain), go(model)
    if how == "quantize":  # ids have no gradient, and neither has a quantized table
        expected = [line for line in expected if "back" not in line or path == PATH]
    assert found == expected
    assert len(found) >= 3
    if how != "quantize":
        assert torch.equal(one, other)
        for finish in (lambda: reparam.merge(model), lambda: None):
            finish()
            found.clear()
            go(model)
            assert [line for line in found if "back" not in line] == [line for line in expected if "back" not in line]


def test_a_handle_from_before_still_removes_its_hook() -> None:
    model = llama()
    seen: list[int] = []
    handle = model.get_submodule(PATH).register_forward_hook(lambda *_: seen.append(1))
    reparam.attach(model, reparam.LoRA(r=1))
    go(model)
    handle.remove()
    go(model)
    assert seen == [1]


def test_the_weight_is_the_parameter_of_the_base() -> None:
    for model, path in ((llama(), PATH), (gpt2(), "transformer.h.0.attn.c_attn")):
        before = dict(model.named_parameters())
        reparam.attach(model, reparam.LoRA(r=1), targets="everything" if path == PATH else "all-linear")
        assert model.get_submodule(path).weight is before[f"{path}.weight"]
        after = dict(model.named_parameters())
        assert all(after[name] is parameter for name, parameter in before.items())


def test_a_quantized_weight_shows_its_sizes_and_refuses_its_numbers() -> None:
    model = t5()
    reparam.quantize(model, "nf4")
    weight = model.encoder.block[0].layer[1].DenseReluDense.wo.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device.type, weight.requires_grad) == (torch.float32, "cpu", False)
    with pytest.raises(reparam.ReparamError, match="this weight is quantized"):
        weight + 1
    with pytest.raises(reparam.ReparamError, match="this weight is quantized"):
        nn.functional.linear(torch.zeros(1, weight.shape[1]), weight)
    assert "nf4" in repr(weight)


@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("how", ["copy", "pickle", "torch"])
def test_a_model_with_a_bound_adalora_is_copied_and_pickled(storage: str, how: str) -> None:
    model = llama()
    if storage != "dense":
        reparam.quantize(model, storage)
    adapter = reparam.attach(model, reparam.AdaLoRA(target_r=2, init_r=3, tinit=1, tfinal=1))
    adapter.bind(torch.optim.AdamW(adapter.parameters()), total_steps=10)
    if how == "copy":
        other: Any = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(go(other), go(model))
    with torch.no_grad():  # nothing is shared
        for parameter in other.parameters():
            if parameter.is_floating_point():
                parameter.zero_()
    assert go(model).any()
    assert not go(other).any() or storage != "dense"
