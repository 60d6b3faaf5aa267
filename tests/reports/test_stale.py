"""What is computed once from parameters (DoRA's norms, the bank of a mixed batch) follows every way to write them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import IDS, llama, logits
from sampled import FULL
from selecting import change, under
from torch import Tensor, nn

import reparam
from reparam.core.versions import SAMPLES
from reparam.sites.module import Adapted

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
METHODS = {
    "lora": lambda: reparam.LoRA(r=2, alpha=4),
    "dora": lambda: reparam.DoRA(r=2, alpha=4),
    "dora, columns": lambda: reparam.DoRA(r=2, alpha=4, norm_axis="input"),
    "dora, magnitudes": lambda: reparam.DoRA(magnitude_only=True),
    "adalora with magnitudes": lambda: reparam.AdaLoRA(init_r=3, target_r=2, magnitude=True),
    "intrinsic": lambda: reparam.Intrinsic(d=64),
}


def two(method: str) -> Any:
    """A model with the adapters a and b of this method, both with a trained bias where the base has one."""
    model = llama(attention_bias=True)
    for seed, name in enumerate("ab"):
        adapter = reparam.attach(model, METHODS[method](), targets=["q_proj", "down_proj"], name=name, bias=True)
        change(adapter, seed)
    return model.eval()


def swapped(module: nn.Module, value: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter by a new one."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(value(parameter.detach()))


def stepped(module: nn.Module, optimizer: Any, **settings: Any) -> None:
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.requires_grad_()
        parameter.grad = torch.ones_like(parameter)
    optimizer(parameters, lr=0.2, **settings).step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def loaded(module: nn.Module, *, assign: bool) -> None:
    module.load_state_dict({key: 1.5 * value + 0.1 for key, value in module.state_dict().items()}, assign=assign)


def raw(module: nn.Module, write: Callable[[Any], Any]) -> None:
    for parameter in module.parameters():
        write(parameter)


def numpy_view(parameter: nn.Parameter) -> None:
    view = parameter.detach().numpy()
    view *= 1.5


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    ".data.mul_": lambda m: raw(m, lambda p: p.data.mul_(1.5)),
    ".data.copy_": lambda m: raw(m, lambda p: p.data.copy_(p.data * 1.5)),
    ".data.neg_": lambda m: next(m.parameters()).data.neg_(),
    ".data[...] =": lambda m: raw(m, lambda p: p.data.__setitem__(..., p.data + 0.1)),
    ".data =": lambda m: raw(m, lambda p: setattr(p, "data", p.data * 1.5)),
    ".data.lerp_": lambda m: raw(m, lambda p: p.data.lerp_(torch.ones_like(p), 0.2)),
    "one row through .data": lambda m: raw(m, lambda p: p.data[:1].add_(0.5)),
    "detach().mul_": lambda m: raw(m, lambda p: p.detach().mul_(1.5)),
    "foreach on .data": lambda m: torch._foreach_mul_([p.data for p in m.parameters()], 1.5),
    "set_": lambda m: raw(m, lambda p: p.set_((p.data * 1.5).contiguous())),
    "numpy": lambda m: raw(m, numpy_view),
    "resized storage": lambda m: raw(m, lambda p: p.untyped_storage().copy_((p.data * 1.5).untyped_storage())),
    "state dict": lambda m: loaded(m, assign=False),
    "state dict, assigned": lambda m: loaded(m, assign=True),
    "new parameters": lambda m: swapped(m, lambda p: 1.5 * p),
    "swap_tensors": lambda m: raw(m, lambda p: torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 1.5))),
    "fused AdamW": lambda m: stepped(m, torch.optim.AdamW, fused=True),
    "foreach AdamW": lambda m: stepped(m, torch.optim.AdamW, foreach=True),
    "fused SGD": lambda m: stepped(m, torch.optim.SGD, fused=True),
    "paged AdamW": lambda m: stepped(m, reparam.optim.PagedAdamW),
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(
        1.5 * nn.utils.parameters_to_vector(m.parameters()), m.parameters()
    ),
}


def merged(model: nn.Module, name: str) -> Tensor:
    """The outputs of a merged copy in which nothing is cached."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__dict__.pop("_squared_norms", None)
        if hasattr(module, "forget"):
            module.forget()
    reparam.select(twin, name)
    reparam.merge(twin)
    return logits(twin)


def near(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def check(model: nn.Module, before: Tensor) -> None:
    """Alone, in a mixed batch, and in training mode."""
    expected = merged(model, "a")
    assert not near(expected, before)
    assert near(under(model, "a"), expected)
    mixed = under(model, ["b", "a", None])
    assert near(mixed[1], expected[1])
    assert near(mixed[0], merged(model, "b")[0])
    reparam.select(model, "a")
    assert near(logits(model.train()), expected)
    model.eval()


@pytest.mark.parametrize(
    ("method", "write"),
    [
        *itertools.product(["dora"], WRITES),
        *(("lora", w) for w in (WRITES if FULL else list(WRITES)[::3])),
        *itertools.product(list(METHODS)[2:], [".data.mul_", "numpy"]),
    ],
)
@torch.no_grad()
def test_a_write_to_an_adapter_is_seen(method: str, write: str) -> None:
    model = two(method)
    if method == "intrinsic":  # one vector for all sites
        trained: nn.Module = reparam.adapters(model)["a"].shared  # type: ignore[assignment]
    else:
        trained = nn.ModuleList(module.updates["a"] for module in reparam.adapters(model)["a"].modules.values())
    before = under(model, "a")
    under(model, ["b", "a", None])
    try:
        with torch.enable_grad() if "optim" in write else torch.no_grad():
            WRITES[write](trained)
    except NotImplementedError:
        pytest.skip("torch does not have this optimizer on a CPU")
    check(model, before)


@pytest.mark.parametrize(
    ("method", "write"),
    [*itertools.product(["dora"], WRITES), ("lora", ".data.mul_"), ("dora, columns", ".data.mul_")],
)
@torch.no_grad()
def test_a_write_to_the_whole_base_is_seen(method: str, write: str) -> None:
    model = two(method)
    modules: list[Adapted] = list(reparam.adapters(model)["a"].modules.values())
    holder = nn.Module()
    for number, module in enumerate(modules):
        part = nn.Module()
        part._parameters = module._parameters  # the same dictionary: what is replaced there is replaced here
        holder.add_module(str(number), part)
    before = under(model, "a")
    under(model, ["b", "a", None])
    if write == "one row through .data":  # can be missed
        raw(holder, lambda p: p.data[::2].add_(0.5))
    else:
        WRITES[write](holder)
    check(model, before)


@torch.no_grad()
def test_a_counted_write_to_one_element_of_the_base_is_seen() -> None:
    model = two("dora")
    weight = model.get_submodule(V).weight
    assert weight.numel() > SAMPLES
    before = under(model, "a")
    under(model, ["b", "a", None])
    with torch.no_grad():
        weight[31, 47] += 30
    check(model, before)


@pytest.mark.parametrize("method", ["lora", "dora"])
@torch.no_grad()
def test_a_write_while_a_list_is_selected_is_seen_by_the_next_prompt(method: str) -> None:
    model = two(method)
    reparam.select(model, ["b", "a", None])
    logits(model)
    for parameter in reparam.adapters(model)["a"].parameters():
        parameter.data.mul_(1.5)
    mixed = logits(model)
    assert near(mixed[1], merged(model, "a")[1])
    assert near(mixed[0], merged(model, "b")[0])


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_copy_and_its_original_are_apart(method: str) -> None:
    model = two(method)
    before, mixed = under(model, "a"), under(model, ["b", "a", None])
    twin = copy.deepcopy(model)
    for parameter in reparam.adapters(twin)["a"].parameters():
        parameter.data.mul_(1.5)
    check(twin, before)
    assert torch.equal(under(model, "a"), before)
    assert torch.equal(under(model, ["b", "a", None]), mixed)


@torch.no_grad()
def test_an_address_used_again_with_the_same_count_of_writes_is_seen() -> None:
    """As with a cache of weights that swaps adapters in and out of one buffer."""
    model = two("dora")
    before = under(model, "a")
    for parameter in reparam.adapters(model)["a"].parameters():
        kept = parameter._version, parameter.data_ptr()
        parameter.data.copy_(parameter.data * 1.5)
        assert kept == (parameter._version, parameter.data_ptr())
    check(model, before)


@pytest.mark.parametrize("which", ["a", ["b", "a", None]], ids=str)
@torch.no_grad()
def test_a_generation_with_a_cache_computes_what_one_without_does(which: Any) -> None:
    model = two("dora")
    reparam.select(model, which)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    one = model.generate(IDS, use_cache=False, **settings)
    assert torch.equal(model.generate(IDS, use_cache=True, **settings), one)
    for parameter in reparam.adapters(model)["a"].parameters():
        parameter.data.mul_(-1.5)
    after = model.generate(IDS, use_cache=True, **settings)
    assert torch.equal(after, model.generate(IDS, use_cache=False, **settings))
    assert not torch.equal(after, one)


@torch.no_grad()
def test_an_error_in_a_step_of_a_generation_ends_it() -> None:
    model = two("dora")
    reparam.select(model, "a")
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(TypeError):
        model(input_ids=IDS[:, :1], past_key_values=cache, position_ids="?")
    module = reparam.adapters(model)["a"].modules[Q]
    x = torch.ones(1, 32)
    before = module(x)
    module.updates["a"].magnitude.data.mul_(2)
    assert not near(module(x), before)
