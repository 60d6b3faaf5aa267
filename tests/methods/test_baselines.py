"""Full fine-tuning, BitFit and bottleneck adapters, compared with plain torch and hand-written references."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from cases import error, move
from models import IDS, logits
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam import BitFit, Bottleneck, Full
from reparam.core.base import Site
from reparam.errors import InputDependentError
from reparam.inspect.summary import summarize
from reparam.recipes.merge import merge_to
from reparam.sites.module import Adapted


def loss(model: Any) -> Tensor:
    return models.loss(model) if hasattr(model, "lm_head") else models.scores(model).square().mean()


# ---- full


def own(model: nn.Module, adapter: reparam.Adapter) -> dict[str, Tensor]:
    """The parameters of full fine-tuning, with the names and layout of a plain model."""
    found = {}
    for path, update in adapter.updates.items():
        site, bias = adapter.sites[path], adapter.modules[path].biases
        matrix: Tensor = update.matrix  # type: ignore[assignment]
        matrix = matrix.squeeze(1) if site.kind == "vector" else matrix.t() if site.transposed else matrix
        found[f"{path}.weight"] = matrix.detach()
        if "default" in bias:
            found[f"{path}.bias"] = bias["default"].detach()
    return found


@pytest.mark.parametrize("make", [models.llama, models.bert])
def test_steps_of_full_are_plain_adamws_bit_for_bit(make: Callable[[], Any]) -> None:
    """Compared with torch's AdamW on the model's own parameters, with weight decay."""
    plain, model = make(), make()
    adapter = reparam.attach(model, Full())
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW(m, **settings) for m in (list(plain.parameters()), adapter.parameters())]
    for _ in range(3):
        losses = [loss(plain), loss(model)]
        assert torch.equal(*losses)
        for value, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        expected = {name: parameter.detach() for name, parameter in plain.named_parameters()}
        assert models.same(own(model, adapter), expected)
    assert torch.equal(logits(model), logits(plain))


def test_full_trains_all_parameters_of_gpt2_as_plain_adamw_does() -> None:
    """Not bit for bit, because `Conv1D` multiplies in another order."""
    plain, model = models.gpt2().eval(), models.gpt2().eval()
    adapter = reparam.attach(model, Full())
    for m, parameters in ((plain, list(plain.parameters())), (model, adapter.parameters())):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        loss(m).backward()
        optimizer.step()
    found = own(model, adapter)
    for name, parameter in plain.named_parameters():
        assert error(found[name], parameter) < 1e-5, name


def test_full_leaves_tied_matrices_alone_and_says_so() -> None:
    with pytest.warns(
        UserWarning, match=r"shares its weight with lm_head: call reparam\.untie\(model\) or attach with tie"
    ):
        adapter = reparam.attach(models.tied_llama(), Full())
    assert not {"lm_head", "model.embed_tokens"} & set(adapter.sites)


def test_full_over_words_of_the_user_trains_no_more() -> None:
    adapter = reparam.attach(models.llama(), Full(), targets="attention")
    assert all("self_attn" in name for name in adapter.sites)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_full_on_quantized_matrices_begins_at_their_unpacked_values(storage: str) -> None:
    model = models.llama()
    reparam.quantize(model, storage)
    y = logits(model)
    adapter = reparam.attach(model, Full())
    for path, update in adapter.updates.items():
        assert torch.equal(update.matrix, adapter.modules[path].frozen.dense())
    assert error(logits(model), y) < 1e-5


def test_full_merges_into_what_it_trained() -> None:
    model = models.gpt2()
    adapter = reparam.attach(model, Full())
    move(adapter, 1)
    found = {name: tensor.clone() for name, tensor in own(model, adapter).items()}
    report = reparam.merge(model)
    assert report.biased == ()
    plain = dict(model.named_parameters())
    assert plain.keys() == found.keys()
    assert all(error(plain[name], tensor) < 1e-6 for name, tensor in found.items())


def test_full_adapters_are_summed(tmp_path: Path) -> None:
    """Summing full-rank updates needs the base."""
    model, base = models.llama(), models.llama()
    for number in (1, 2):
        adapter = reparam.attach(model, Full(), targets="q_proj", name=str(number) + "x")
        move(adapter, number)
        adapter.save(tmp_path / str(number))
    changes = [
        sum(
            reparam.adapters(model)[f"{n}x"].updates[path].matrix.detach() - base.get_submodule(path).weight
            for n in "12"
        )
        for path in adapter.sites
    ]
    blend = reparam.blend([tmp_path / "1", tmp_path / "2"], [1, 1], base=base, rank=32)
    for path, change in zip(adapter.sites, changes, strict=True):
        found = blend.record.tensors[f"{path}.B"] @ blend.record.tensors[f"{path}.A"]
        assert error(found, change) < 1e-5


# ---- BitFit


def test_bitfit_trains_the_biases_and_nothing_else() -> None:
    model = models.gpt2()
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    adapter = reparam.attach(model, BitFit())
    assert sum(p.numel() for p in adapter.parameters()) == sum(b.numel() for b in biases.values())
    assert {site.kind for site in adapter.sites.values()} == {"linear", "vector"}
    move(adapter, 1)
    deltas = {path: update.delta.detach().clone() for path, update in adapter.updates.items()}  # type: ignore[operator]
    y, before = logits(model), models.frozen(models.gpt2())
    reparam.merge(model)
    assert error(logits(model), y) < 1e-5
    for name, tensor in models.frozen(model).items():
        expected = before[name] + deltas[name.removesuffix(".bias")] if name in biases else before[name]
        assert torch.equal(tensor, expected), name


def test_bitfit_gradients_are_those_of_the_biases() -> None:
    plain, model = models.gpt2(), models.gpt2()
    adapter = reparam.attach(model, BitFit())
    for m in (plain, model):
        loss(m).backward()
    for path, update in adapter.updates.items():
        assert error(update.delta.grad, plain.get_submodule(path).bias.grad) < 1e-4, path  # type: ignore[union-attr]


def test_bitfit_on_a_model_without_biases_names_the_setting() -> None:
    model = models.llama()
    with pytest.raises(ValueError, match=r"bitfit cannot go on .*this layer has no bias; set create=True to add one"):
        reparam.attach(model, BitFit())
    assert not any(isinstance(module, Adapted) for module in model.modules())
    adapter = reparam.attach(model, BitFit(create=True))
    assert {site.kind for site in adapter.sites.values()} == {"linear"}
    with pytest.raises(ValueError, match=r"bitfit cannot go on model\.norm: this vector has no bias"):
        reparam.attach(model, BitFit(create=True), targets=["norm", "q_proj"], name="other")


def test_biases_that_a_class_does_not_read_are_not_written(tmp_path: Path) -> None:
    """`from_pretrained` would ignore them."""
    models.save_base(tmp_path / "base")
    model = models.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    adapter = reparam.attach(model, BitFit(create=True), targets="all-linear")
    move(adapter, 1)
    adapter.save(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"cannot load .*q_proj\.bias"):
        merge_to(
            tmp_path / "merged", str(tmp_path / "base"), str(tmp_path / "adapter"), dtype="auto", console=Console()
        )
    assert not (tmp_path / "merged").exists()


def test_bitfit_is_not_taken_for_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    adapter = reparam.attach(models.gpt2(), BitFit())
    adapter.save(tmp_path / "fresh")
    assert summarize(tmp_path / "fresh").idle
    move(adapter, 1)
    adapter.save(tmp_path / "moved")
    found = summarize(tmp_path / "moved", models.gpt2())
    assert not found.idle
    assert all(site.change == 0 and site.offset > 0 for site in found.sites)


# ---- bottlenecks


def reference(model: Any, adapter: reparam.Adapter, method: Bottleneck) -> Tensor:
    """A plain model with hand-written networks after its modules."""
    sigma = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[method.activation]
    plain, hooks = model, []
    for path, update in adapter.updates.items():

        def after(_: nn.Module, args: tuple[Tensor], y: Tensor, u: Any = update) -> Tensor:
            read = args[0] if method.placement == "parallel" else y
            return y + method.scale * (sigma(read @ u.down.T + u.down_bias) @ u.up.T + u.up_bias)

        hooks.append(plain.get_submodule(path).register_forward_hook(after))
    found = logits(plain)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert])
@pytest.mark.parametrize(
    "method",
    [
        Bottleneck(r=4),
        Bottleneck(r=3, placement="pfeiffer", activation="gelu"),
        Bottleneck(r=4, placement="parallel", activation="silu", scale=4.0),
    ],
    ids=lambda m: m.placement,
)
def test_a_bottleneck_is_the_network_of_the_paper(make: Callable[[], Any], method: Bottleneck) -> None:
    model = make()
    base = logits(model)
    adapter = reparam.attach(model, method)
    assert torch.equal(logits(model), base)
    move(adapter, 1)
    y = logits(model)
    assert error(y, base) > 1e-2
    assert error(y, reference(make(), adapter, method)) < 1e-5


@pytest.mark.parametrize(
    ("make", "attention", "mlp"),
    [
        (models.llama, {"o_proj"}, {"down_proj"}),
        (models.gpt2, {"attn.c_proj"}, {"mlp.c_proj"}),
        (models.bert, {"attention.output.dense"}, {"output.dense"}),
        (models.t5, {"SelfAttention.o", "EncDecAttention.o"}, {"wo"}),
    ],
)
def test_the_placements_are_the_ends_of_the_sub_layers(
    make: Callable[[], Any], attention: set[str], mlp: set[str]
) -> None:
    layers = 4 if make is models.t5 else 2
    counts = {"houlsby": len(attention) * 2 + layers + (2 if make is models.t5 else 0), "pfeiffer": layers}
    counts["parallel"] = layers
    for placement, count in counts.items():
        sites = reparam.attach(make(), Bottleneck(r=2, placement=placement)).sites
        ends = attention | mlp if placement == "houlsby" else mlp
        assert len(sites) == count, (placement, list(sites))
        assert all(any(path.endswith("." + end) for end in ends) for path in sites)
        assert placement == "houlsby" or not any("ttention" in path for path in sites)


def test_a_bottleneck_is_used_alone_and_says_so(tmp_path: Path) -> None:
    model = models.llama()
    adapter = reparam.attach(model, Bottleneck(r=4), name="one")
    move(adapter, 1)
    y = logits(model)
    told = model.generate(IDS, max_new_tokens=4, do_sample=False)
    with pytest.raises(InputDependentError, match="bottleneck adapter has a nonlinearity"):
        reparam.merge(model)
    with pytest.raises(InputDependentError, match="mixed batch"):
        reparam.select(model, ["one", None, "one"])
    with pytest.raises(ValueError, match="a bottleneck needs a linear layer"):
        reparam.attach(model, Bottleneck(), targets="embed_tokens", name="two")
    adapter.save(tmp_path / "a")
    other = models.llama()
    reparam.load(other, tmp_path / "a")
    assert torch.equal(logits(other), y)
    assert torch.equal(other.generate(IDS, max_new_tokens=4, do_sample=False), told)


def test_settings_that_cannot_be_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"placement='x'.*activation='tanh'.*r=0.*scale=0") as caught:
        Bottleneck(r=0, placement="x", activation="tanh", scale=0)
    assert "houlsby, pfeiffer, parallel" in str(caught.value)
    assert Bottleneck().unsupported_reason(Site("a", "vector", 3, 1)) is not None
