"""LoRA: scales, patterns, initialization, the invariants of the paper and its code, and refusals."""

import math
import shutil
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import reparam
from reparam.core.base import Site
from reparam.methods.lora import LoRAUpdate
from reparam.sites.linear import Linear

sizes = st.integers(1, 9)
ranks = st.integers(1, 5)


def site(outputs: int, inputs: int, *, name: str = "layer", kind: str = "linear") -> Site:
    return Site(name, kind, outputs, inputs)  # type: ignore[arg-type]


def layer(outputs: int, inputs: int, method: reparam.LoRA, *, name: str = "layer", seed: int | None = 0) -> Linear:
    """A float64 layer with this update; with a seed, its factors are random."""
    generator = torch.Generator().manual_seed(seed or 0)
    plain = nn.Linear(inputs, outputs).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, generator=generator)
    adapted = Linear.wrap(plain)
    adapted.add("a", method.build(site(outputs, inputs, name=name), adapted.frozen, None).double())
    adapted.active = "a"
    if seed is not None:
        for parameter in adapted.updates["a"].parameters():
            nn.init.normal_(parameter, generator=generator)
    return adapted


def update_of(adapted: Linear) -> LoRAUpdate:
    found = adapted.updates["a"]
    assert isinstance(found, LoRAUpdate)
    return found


def change(adapted: Linear, x: Tensor) -> Tensor:
    """The difference of the layer's output to the base's."""
    y = adapted(x)
    adapted.active = None
    base = adapted(x)
    adapted.active = "a"
    return y - base


def batch(inputs: int, rows: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the function


@given(outputs=sizes, inputs=sizes, r=ranks, alpha=st.floats(0.01, 64), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds")
def test_the_output_is_the_papers_equation(outputs: int, inputs: int, r: int, alpha: float, seed: int) -> None:
    adapted = layer(outputs, inputs, reparam.LoRA(r=r, alpha=alpha), seed=seed)
    update, x = update_of(adapted), batch(inputs)
    W = adapted.frozen.tensor()
    expected = x @ W.T + adapted.bias + alpha / r * (x @ update.A.T) @ update.B.T
    torch.testing.assert_close(adapted(x), expected)


@given(outputs=sizes, inputs=sizes, r=ranks, seed=st.integers(0, 99), trains=st.booleans(), wants=st.booleans())
def test_gradients_are_the_closed_forms(
    outputs: int, inputs: int, r: int, seed: int, trains: bool, wants: bool
) -> None:
    """With G = ∂L/∂y: dB = s Gᵀ(x Aᵀ), dA = s (G B)ᵀ x, dx = G W + s (G B) A; also when only one is needed."""
    adapted = layer(outputs, inputs, reparam.LoRA(r=r, alpha=3.0), seed=seed)
    update, x, s = update_of(adapted), batch(inputs).requires_grad_(wants), 3.0 / r
    update.A.requires_grad_(trains)
    G = torch.randn(6, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    adapted(x).backward(G)
    A, B, W = update.A.detach(), update.B.detach(), adapted.frozen.tensor().detach()
    torch.testing.assert_close(update.B.grad, s * G.T @ (x.detach() @ A.T))
    if trains:
        torch.testing.assert_close(update.A.grad, s * (G @ B).T @ x.detach())
    if wants:
        torch.testing.assert_close(x.grad, G @ W + s * (G @ B) @ A)
    assert (update.A.grad is None) == (not trains)
    assert (x.grad is None) == (not wants)
    assert adapted.frozen.tensor().grad is None


def test_second_derivatives_are_those_of_differences() -> None:
    """A gradient penalty differentiates through the fused, in-place backward pass."""
    adapted = layer(4, 3, reparam.LoRA(r=2))
    x = batch(3, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *_: adapted(x), (x, *update_of(adapted).parameters()))


def test_an_input_that_others_read_too_gets_its_whole_gradient() -> None:
    """The fused backward adds in place; it must neither overwrite nor lose another reader's gradient."""
    first = layer(5, 3, reparam.LoRA(r=2), seed=1)
    second = layer(5, 3, reparam.LoRA(r=2), seed=2)
    found = []
    for grad_enabled in (True, False):  # the second time through plain matrices
        x = batch(3).requires_grad_()
        h = x.sin()
        if grad_enabled:
            y = first(h) * second(h) + h.sum(-1, keepdim=True)
        else:
            one, two = (
                h @ (m.frozen.tensor() + update_of(m).scale * update_of(m).B @ update_of(m).A).T + m.bias
                for m in (first, second)
            )
            y = one * two + h.sum(-1, keepdim=True)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(found[0], found[1])


@given(outputs=sizes, inputs=sizes, r=ranks, seed=st.integers(0, 99))
def test_the_change_has_at_most_its_rank(outputs: int, inputs: int, r: int, seed: int) -> None:
    adapted = layer(outputs, inputs, reparam.LoRA(r=r), seed=seed)
    factors = update_of(adapted).factors(adapted.frozen)
    assert int(torch.linalg.matrix_rank(factors.B @ factors.A)) <= min(r, outputs, inputs)


@given(c=st.floats(0.1, 10) | st.floats(-10, -0.1), seed=st.integers(0, 99))
def test_scaling_one_factor_and_unscaling_the_other_is_the_same_function(c: float, seed: int) -> None:
    adapted, x = layer(5, 4, reparam.LoRA(r=2), seed=seed), batch(4)
    before = adapted(x)
    with torch.no_grad():
        update_of(adapted).A.mul_(c)
        update_of(adapted).B.div_(c)
    torch.testing.assert_close(adapted(x), before)


@given(r=ranks, s=ranks, seed=st.integers(0, 99))
def test_concatenated_ranks_are_the_sum_of_adapters(r: int, s: int, seed: int) -> None:
    one = layer(6, 5, reparam.LoRA(r=r, scaling="none"), seed=seed)
    two = layer(6, 5, reparam.LoRA(r=s, scaling="none"), seed=seed + 1)
    both = layer(6, 5, reparam.LoRA(r=r + s, scaling="none"), seed=seed)
    with torch.no_grad():
        update_of(both).A.copy_(torch.cat([update_of(one).A, update_of(two).A]))
        update_of(both).B.copy_(torch.cat([update_of(one).B, update_of(two).B], 1))
    x = batch(5)
    torch.testing.assert_close(change(both, x), change(one, x) + change(two, x))


# ---- scales


@given(r=st.integers(1, 64), a=st.floats(0.01, 100))
def test_the_conventions_of_scale(r: int, a: float) -> None:
    def scale(scaling: str, alpha: float) -> float:
        return reparam.LoRA(r=r, alpha=alpha, scaling=scaling).scale(r=r, alpha=alpha)

    assert scale("alpha_over_r", a) == a / r
    assert scale("alpha", a) == a
    assert scale("rslora", a) == a / math.sqrt(r)
    assert scale("none", a) == 1
    assert scale("alpha_over_r", a * r) == pytest.approx(scale("alpha", a))
    assert reparam.LoRA().scaling == "alpha_over_r"


@pytest.mark.parametrize(("scaling", "factor"), [("alpha_over_r", 2), ("alpha", 2), ("rslora", 2), ("none", 1)])
def test_doubling_alpha_doubles_the_change(scaling: str, factor: int) -> None:
    x = batch(4)
    once, twice = (change(layer(5, 4, reparam.LoRA(r=3, alpha=a, scaling=scaling)), x) for a in (1.5, 3.0))
    torch.testing.assert_close(twice, factor * once)


# ---- patterns


def test_ranks_and_alphas_follow_the_first_pattern_that_matches_the_end_of_a_path() -> None:
    method = reparam.LoRA(
        r=4,
        alpha=8,
        rank_pattern={r"layers\.0\..*": 1, "down_proj": 6, ".*proj": 3},
        alpha_pattern={"mlp.down_proj": 1.0},
    )
    adapter = reparam.attach(models.llama(), method)
    found = {name: len(update.A) for name, update in adapter.updates.items()}  # type: ignore[arg-type]
    for name, rank in found.items():
        assert rank == (1 if "layers.0." in name else 6 if "down_proj" in name else 3)
    scales = {name: update.scale for name, update in adapter.updates.items()}
    assert scales["model.layers.1.mlp.down_proj"] == 1 / 6
    assert scales["model.layers.0.mlp.down_proj"] == 1.0
    assert scales["model.layers.1.self_attn.q_proj"] == 8 / 3


def test_a_pattern_is_not_a_part_of_a_name() -> None:
    """`proj` is not a whole trailing path segment of `model.layers.0.self_attn.q_proj`."""
    with pytest.raises(ValueError, match=r"rank_pattern 'proj' matches none of the 14 sites"):
        reparam.attach(models.llama(), reparam.LoRA(rank_pattern={"proj": 2}))
    with pytest.raises(ValueError, match=r"alpha_pattern 'k_projj' matches none"):
        reparam.attach(models.llama(), reparam.LoRA(alpha_pattern={"k_projj": 2}))


# ---- initialization


@pytest.mark.parametrize(
    ("settings", "std", "most"),
    [
        ({}, 1 / math.sqrt(3 * 400), 1 / math.sqrt(400)),
        ({"init": "gaussian"}, 1 / math.sqrt(3 * 400), math.inf),
        ({"init": "gaussian", "init_std": 0.5}, 0.5, math.inf),
    ],
)
def test_the_distribution_of_a_fresh_adapter(settings: dict[str, Any], std: float, most: float) -> None:
    method = reparam.LoRA(r=64, **settings)
    update = method.build(site(32, 400), Linear.wrap(nn.Linear(400, 32)).frozen, None)
    assert float(update.A.std()) == pytest.approx(std, rel=0.02)
    assert abs(float(update.A.mean())) < 0.02 * std
    assert float(update.A.abs().max()) <= most
    assert float(update.A.abs().max()) > min(0.99 * most, 3 * std)
    assert not update.B.any()


def test_an_embedding_starts_at_zero_on_the_side_of_the_vocabulary() -> None:
    adapter = reparam.attach(models.llama(), reparam.LoRA(r=16), targets=["embed_tokens"])
    update = adapter.updates["model.embed_tokens"]
    assert update.B.shape == (97, 16)
    assert not update.B.any()
    assert float(update.A.std()) == pytest.approx(1, rel=0.1)


def test_numbers_depend_on_the_seed_and_the_site_alone() -> None:
    """Not on other sites, the order of attaching, other adapters, or the global random generator."""
    whole = reparam.attach(models.llama(), reparam.LoRA(r=3, seed=5)).tensors()
    model = models.llama()
    torch.manual_seed(1)
    reparam.attach(model, reparam.LoRA(r=2), targets="attention", name="other")
    part = reparam.attach(model, reparam.LoRA(r=3, seed=5), targets=["q_proj", "down_proj"], name="part").tensors()
    assert part
    assert {name: torch.equal(tensor, whole[name]) for name, tensor in part.items()} == dict.fromkeys(part, True)
    other = reparam.attach(models.llama(), reparam.LoRA(r=3, seed=6)).tensors()
    assert not any(torch.equal(other[name], whole[name]) for name in whole if name.endswith("A"))
    drawn = [tensor.flatten()[:90].tolist() for name, tensor in whole.items() if name.endswith("A")]
    assert len({tuple(numbers) for numbers in drawn}) == len(drawn)  # no two sites alike


# ---- training


def test_the_first_step_moves_the_output_side_only() -> None:
    model = models.llama()
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets=["all-linear", "embed_tokens"])
    start = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    models.loss(model).backward()
    assert all(not update.A.grad.any() for update in adapter.updates.values())  # type: ignore[union-attr,operator]
    optimizer.step()
    moved = {name for name, tensor in adapter.tensors().items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if name.endswith(".B")}


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.t5, models.bert])
def test_it_trains_r_times_inputs_and_outputs(make: Any) -> None:
    """Also with keys and values narrower than the model, and with biases."""
    model = make()
    shapes = {name: module.weight.shape for name, module in model.named_modules() if hasattr(module, "weight")}
    adapter = reparam.attach(model, reparam.LoRA(r=3))
    expected = sum(3 * sum(shapes[name]) for name in adapter.sites)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert expected == sum(p.numel() for p in adapter.parameters())


def test_parameter_counts_of_the_paper() -> None:
    """GPT-3, queries and values, r = 1 and 4; LLaMA-7B with q, k, v, up and down at r = 32."""
    assert 96 * 2 * 1 * (12288 + 12288) == 4_718_592
    with torch.device("meta"):
        square = {name: nn.Linear(4096, 4096) for name in "qkv"}
        model = nn.ModuleDict({**square, "up": nn.Linear(4096, 11008), "down": nn.Linear(11008, 4096)})
    adapter = reparam.attach(model, reparam.LoRA(r=32))
    assert 32 * sum(p.numel() for p in adapter.parameters()) == 56_098_816


def test_dropout_is_on_the_branch_alone_and_in_training_alone() -> None:
    adapted = layer(40, 30, reparam.LoRA(r=8, alpha=8, dropout=0.5))
    update, x = update_of(adapted), batch(30, 2000)
    adapted.eval()
    exact = change(adapted, x)
    torch.testing.assert_close(exact, x @ update.A.T @ update.B.T)
    adapted.train()
    torch.manual_seed(0)
    noisy = change(adapted, x)
    torch.manual_seed(0)
    mask = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
    torch.testing.assert_close(noisy, (x * mask) @ update.A.T @ update.B.T)
    assert 0.4 < float((mask == 0).double().mean()) < 0.6
    with torch.no_grad():
        update.B.zero_()  # then the base's output is left, whatever was dropped
    torch.testing.assert_close(change(adapted, x), torch.zeros_like(exact), rtol=0, atol=0)


def test_gradients_under_dropout_are_those_of_the_dropped_input() -> None:
    adapted = layer(5, 4, reparam.LoRA(r=2, dropout=0.5)).train()
    update, x = update_of(adapted), batch(4).requires_grad_()
    G = torch.ones(6, 5, dtype=torch.float64)
    torch.manual_seed(0)
    adapted(x).backward(G)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(torch.ones(6, 4, dtype=torch.float64), 0.5)
    A, B, W = update.A.detach(), update.B.detach(), adapted.frozen.tensor()
    torch.testing.assert_close(update.A.grad, update.scale * (G @ B).T @ (x.detach() * dropped))
    torch.testing.assert_close(x.grad, G @ W + update.scale * (G @ B) @ A * dropped)


def test_the_embedding_looks_up_its_own_row() -> None:
    model = nn.Sequential(nn.Embedding(7, 5, padding_idx=2)).double()
    adapter = reparam.attach(model, reparam.LoRA(r=3), targets=["0"])
    update = adapter.updates["0"].double()
    nn.init.normal_(update.B)  # type: ignore[arg-type]
    ids = torch.tensor([[0, 6, 2], [2, 2, 1]])
    table = model[0].frozen.tensor() + update.scale * update.B @ update.A
    torch.testing.assert_close(model(ids), table[ids])
    model(ids).sum().backward()
    assert set(update.B.grad.abs().sum(1).nonzero().flatten().tolist()) == {0, 1, 6}  # type: ignore[union-attr,operator]


@pytest.mark.skipif(shutil.which("c++") is None, reason="the code generator needs a C++ compiler")
def test_compiled_code_gives_the_same() -> None:
    """With code generation, forward and backward; the conformance suite only traces whole models."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(6, 5))
    adapter = reparam.attach(model, reparam.LoRA(r=2))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 6)
    compiled = torch.compile(model, fullgraph=True)
    outputs = [run(x) for run in (model, compiled)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    found = [torch.autograd.grad(y.square().sum(), adapter.parameters()) for y in outputs]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


# ---- what it refuses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"r=0: a rank is a whole number of at least 1"),
        ({"r": -2}, "r=-2"),
        ({"r": 2.0}, r"r=2\.0"),
        ({"r": True}, "r=True"),
        ({"alpha": 0}, r"alpha=0: expected a finite number above 0"),
        ({"alpha": -1.0}, "alpha=-1"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"alpha": "8"}, "alpha='8'"),
        ({"dropout": 1.0}, r"dropout=1\.0: expected a probability in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0\.1"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"scaling": "r"}, "scaling='r': expected one of alpha_over_r, alpha, rslora, none"),
        ({"init": "zeros"}, "init='zeros': expected one of kaiming_uniform, gaussian"),
        ({"init_std": 0.1}, r"init_std=0\.1: only for init='gaussian'"),
        ({"init": "gaussian", "init_std": 0.0}, r"init_std=0\.0"),
        ({"init": "gaussian", "init_std": math.inf}, "init_std=inf"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0"),
        ({"alpha_pattern": {"q": math.nan}}, r"alpha_pattern\['q'\]=nan"),
        ({"rank_pattern": {"q(": 1}}, r"rank_pattern 'q\(' is not a valid regular expression"),
        ({"alpha_pattern": {"*": 1}}, r"alpha_pattern '\*' is not a valid regular expression"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reparam.LoRA(**settings)


def test_all_bad_settings_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"r=0.*alpha=-1.*dropout=2.*scaling='x'"):
        reparam.LoRA(r=0, alpha=-1, dropout=2, scaling="x")


def test_a_rank_that_is_not_low_is_a_warning_that_names_a_site() -> None:
    with pytest.warns(UserWarning, match=r"rank exceeds min.* at 4 sites .*k_proj, 16 x 32") as caught:
        reparam.attach(models.llama(), reparam.LoRA(r=17), targets="attention")
    assert caught[0].filename == __file__  # told at the caller's line
    reparam.attach(models.llama(), reparam.LoRA(r=16), targets="attention")  # and none here


def test_settings_go_round_as_json() -> None:
    method = reparam.LoRA(r=3, alpha=1.5, rank_pattern={"q_proj": 2}, init="gaussian", init_std=0.1)
    assert reparam.LoRA(**method.settings()) == method
