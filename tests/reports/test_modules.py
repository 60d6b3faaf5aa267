"""Adapted modules keep what users put on them, and show what other code reads of them."""

from __future__ import annotations

import contextlib
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


class Cross(nn.Module):
    """Reads one child's weight in its forward, another's only if a setting asks for it, and a third one's dtype."""

    def __init__(self, *, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        self.read, self.maybe, self.called = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.called.weight.dtype) @ self.read.weight
        if self.exact:
            return nn.functional.linear(x, self.maybe.weight)
        return self.called(self.maybe(x))


def test_a_module_whose_weight_is_read_without_a_call_is_refused_by_name_and_skipped_by_a_word() -> None:
    for exact, names in ((False, ["maybe", "called"]), (True, ["called"])):
        with pytest.warns(UserWarning, match=r"skipped read \(Cross reads its parameters without calling it \(test_m"):
            adapter = reparam.attach(Cross(exact=exact), reparam.LoRA(r=1))
        assert list(adapter.sites) == names
    with pytest.raises(ValueError, match="read: Cross reads its parameters without calling it"):
        reparam.attach(Cross(), reparam.LoRA(r=1), targets=["read"])


def test_mambas_time_step_is_refused_and_bloom_is_adapted_whole() -> None:
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4)
    )
    with pytest.raises(ValueError, match="dt_proj: MambaMixer reads its parameters without calling it"):
        reparam.attach(mamba, reparam.LoRA(r=1), targets=["dt_proj"])
    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2))
    adapter = reparam.attach(bloom, reparam.LoRA(r=1))
    assert {site.rpartition(".")[2] for site in adapter.sites} == {
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    }


@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_layer_of_torch_calls_what_is_adapted(masked: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=masked).eval()
    x = torch.randn(3, 5, 8)
    mask = torch.arange(5).expand(3, 5) > torch.tensor([[4], [2], [3]]) if masked else None
    with torch.no_grad():
        base = model(x, src_key_padding_mask=mask)
        adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["linear1", "linear2", "norm1"])
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3)
        found = model(x, src_key_padding_mask=mask)
        reparam.merge(model)
        expected = model(x, src_key_padding_mask=mask)
    assert float((expected - base).abs().max()) > 0.1
    real = slice(None) if mask is None else ~mask  # torch leaves open what padding becomes
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    assert model.use_nested_tensor == (masked and layer.self_attn.batch_first)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "parametrized"])
def test_a_parametrized_weight_is_refused_in_one_sentence(norm: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrap: Any = {
        "weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
        "parametrized": nn.utils.parametrizations.weight_norm,
    }[norm]
    with pytest.warns(FutureWarning) if norm == "weight_norm" else contextlib.nullcontext():
        wrap(model[0])
    with pytest.raises(ValueError, match=r"0: the weight of this \w+ is computed from other parameters"):
        reparam.attach(model, reparam.LoRA(r=1), targets=["0"])
    with pytest.warns(UserWarning, match="skipped 0"):
        assert list(reparam.attach(model, reparam.LoRA(r=1)).sites) == ["1"]


@pytest.mark.parametrize("method", [reparam.LoRA(r=2), reparam.DoRA(r=2), reparam.Full()], ids=str)
def test_the_row_of_the_padding_does_not_train(method: Any) -> None:
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 3))
    adapter = reparam.attach(model, method, targets=["0"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    module: Any = adapter.modules["0"]
    before = module(torch.arange(7)).detach()
    ids = torch.tensor([2, 2, 2])
    model(ids).square().sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert torch.equal(module(torch.arange(7)).detach(), before)
