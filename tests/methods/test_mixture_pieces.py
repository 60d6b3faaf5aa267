"""The components of mixtures: selections, auxiliary losses, routers."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reparam.methods.mixture import losses, routers
from reparam.methods.mixture.select import GATES, choose, most_probable, softmax

N = 4


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("select", ["softmax", "sigmoid", "top_k"])
@pytest.mark.parametrize("sample", [False, True])
def test_probabilities_are_on_the_simplex(select: str, sample: bool) -> None:
    p = choose(3 * numbers(5, 7, N), select=select, k=2, sample=sample).p
    assert (p >= 0).all()
    assert torch.allclose(p.sum(-1), torch.ones(5, 7, dtype=p.dtype))


def test_temperature_goes_from_the_largest_to_uniform() -> None:
    z = numbers(6, N)
    assert torch.allclose(softmax(z, temperature=1e6), torch.full((6, N), 1 / N, dtype=z.dtype), atol=1e-5)
    assert torch.equal(softmax(z, temperature=1e-4).argmax(-1), z.argmax(-1))
    assert float(softmax(z, temperature=1e-4).max(-1).values.min()) > 0.999


def test_a_mask_leaves_the_others_their_proportions() -> None:
    z = numbers(6, N)
    for select in ("softmax", "sigmoid"):
        whole = choose(z, select=select).p
        allowed = torch.tensor([True, False, True, True])
        part = choose(z, select=select, allowed=allowed).p
        assert torch.allclose(part, whole * allowed / (whole * allowed).sum(-1, keepdim=True))
    one = torch.tensor([False, False, True, False])
    assert torch.equal(choose(z, allowed=one).weights, one.double().expand(6, N))
    two = choose(z, select="top_k", k=3, gate="one", allowed=torch.tensor([True, False, True, False]))
    assert (two.weights.sum(-1) == 2).all()


@pytest.mark.parametrize("k", range(1, N + 1))
@pytest.mark.parametrize("gate", GATES)
def test_top_k_weights_are_those_of_the_table(k: int, gate: str) -> None:
    z = numbers(9, N)
    choice = choose(z, select="top_k", k=k, gate=gate)
    p = torch.softmax(z, -1)
    for row in range(9):
        best = sorted(range(N), key=lambda i: -float(p[row, i]))[:k]
        total = float(p[row, best].sum())
        for i in range(N):
            expected = {"prob": p[row, i], "renorm": p[row, i] / total, "ste": 1.0, "one": 1.0}[gate]
            assert float(choice.weights[row, i]) == pytest.approx(float(expected) if i in best else 0.0)
            assert bool(choice.counted[row, i]) == (i in best)


def test_ties_go_to_the_lower_number_always() -> None:
    assert most_probable(torch.full((3, 8), 0.125), 2).tolist() == [[True, True] + [False] * 6] * 3
    p = torch.tensor([[0.1, 0.4, 0.4, 0.1]])
    assert most_probable(p, 1).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(
    ("settings", "reached"),
    [
        ({}, True),
        ({"select": "sigmoid"}, True),
        ({"select": "top_k", "k": 2, "gate": "prob"}, True),
        ({"select": "top_k", "k": 1, "gate": "prob"}, True),
        ({"select": "top_k", "k": 2, "gate": "renorm"}, True),
        ({"select": "top_k", "k": 1, "gate": "renorm"}, False),
        ({"select": "top_k", "k": 1, "gate": "ste"}, True),
        ({"select": "top_k", "k": 1, "gate": "one"}, False),
        ({"select": "top_k", "k": 2, "gate": "one"}, False),
    ],
)
def test_which_selections_pass_a_gradient_to_the_router(settings: dict, reached: bool) -> None:
    z = numbers(9, N).requires_grad_()
    weights = choose(z, **settings).weights
    values = numbers(9, N, seed=1)
    found = None
    if weights.requires_grad:
        (found,) = torch.autograd.grad((weights * values).sum(), z)
    assert reached == (found is not None and bool(found.abs().max() > 1e-9))


def test_adding_a_constant_to_all_logits_changes_nothing() -> None:
    z = numbers(9, N)
    for select in ("softmax", "top_k"):
        assert torch.allclose(choose(z + 3, select=select).weights, choose(z, select=select).weights)


@given(st.permutations(range(N)))
def test_permuting_experts_permutes_everything(order: list[int]) -> None:
    z = numbers(9, N)
    for settings in ({}, {"select": "sigmoid"}, {"select": "top_k", "k": 2, "gate": "renorm"}):
        one, other = choose(z, **settings), choose(z[:, order], **settings)
        assert torch.allclose(one.weights[:, order], other.weights)
        assert losses.switch_balance(one.p, one.counted) == pytest.approx(losses.switch_balance(other.p, other.counted))


# ---- losses


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return torch.softmax(numbers(*shape, N, seed=seed), -1)


LOSSES = {
    "switch_balance": lambda p, valid: losses.switch_balance(p, most_probable(p, 1), valid),
    "mole_balance": losses.mole_balance,
    "loramoe_blc": losses.loramoe_blc,
    "router_z": losses.router_z,
}


def test_values_at_uniform_and_at_collapse() -> None:
    flat = torch.full((3, 8, N), 1 / N, dtype=torch.float64)
    even = torch.eye(N, dtype=torch.bool).repeat(6, 1).view(3, 8, N)
    assert float(losses.switch_balance(flat, even)) == pytest.approx(1)
    assert float(losses.mole_balance(flat)) == pytest.approx(0, abs=1e-9)
    assert float(losses.loramoe_blc(flat)) == pytest.approx(0, abs=1e-9)
    one = torch.zeros_like(flat)
    one[..., 2] = 1
    assert float(losses.switch_balance(one, one > 0)) == pytest.approx(N)
    assert float(losses.mole_balance(one)) > 500
    assert float(losses.loramoe_blc(one)) == pytest.approx((3 * 6**2 + 9 * 2**2) / 11 / 2**2)


def test_router_z_at_zero_logits() -> None:
    assert float(losses.router_z(torch.zeros(5, N))) == pytest.approx(math.log(N) ** 2)


def test_the_typed_importance_of_loramoe() -> None:
    p = torch.full((2, 3, N), 1 / N, dtype=torch.float64)
    types, alpha = torch.tensor([1, 0]), 0.5
    z = torch.tensor([[1.5, 1.5, 0.5, 0.5], [0.5, 0.5, 1.5, 1.5]], dtype=torch.float64) * 3 / N
    expected = float(z.var() / z.mean() ** 2)
    assert float(losses.loramoe_blc(p, types=types, alpha=alpha)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_gradient_and_sees_valid_tokens_alone(name: str) -> None:
    p = probabilities(3, 5).requires_grad_()
    (found,) = torch.autograd.grad(LOSSES[name](p, None), p)
    assert float(found.abs().max()) > 1e-6
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
    junk = torch.where(valid[..., None], p, probabilities(3, 5, seed=9))
    assert float(LOSSES[name](junk, valid)) == pytest.approx(float(LOSSES[name](p, valid)))
    if name != "loramoe_blc":
        kept = p[valid]
        assert float(LOSSES[name](kept, None)) == pytest.approx(float(LOSSES[name](p, valid)))
    nothing = LOSSES[name](p, torch.zeros(3, 5, dtype=torch.bool))
    assert float(nothing) == pytest.approx(0)
    (found,) = torch.autograd.grad(nothing, p)
    assert found.isfinite().all()


def test_pooling_layers_hides_collapse() -> None:
    """This is why each loss is computed for one router."""
    layers = torch.eye(N, dtype=torch.float64)[:, None].expand(N, 6, N)  # each layer collapsed on another expert
    pooled = float(losses.switch_balance(layers, layers > 0))
    each = [float(losses.switch_balance(layer, layer > 0)) for layer in layers]
    assert pooled == pytest.approx(1)
    assert each == pytest.approx([N] * N)


def pairs(m: int, experts: int = 2, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """m outputs of each expert: equal for one expert, orthogonal between experts."""
    outputs = torch.eye(width, dtype=torch.float64)[:experts].repeat_interleave(m, 0)
    return outputs, torch.arange(experts).repeat_interleave(m), torch.ones(m * experts, dtype=torch.float64)


@pytest.mark.parametrize(("tau", "value"), [(0.1, 1.38635), (0.5, 1.54259), (1.0, 1.76463)])
def test_contrastive_values(tau: float, value: float) -> None:
    outputs, expert, size = pairs(5)
    assert float(losses.contrastive(outputs, expert, size, temperature=tau)) == pytest.approx(value, abs=1e-5)
    same = torch.ones(7, 6, dtype=torch.float64)
    owner = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    assert float(losses.contrastive(same, owner, torch.ones(7), temperature=tau)) == pytest.approx(math.log(6))


def test_contrastive_is_free_of_order_names_and_sizes() -> None:
    outputs, expert = numbers(12, 6), torch.arange(12) % 3
    size = torch.ones(12, dtype=torch.float64)
    value = float(losses.contrastive(outputs, expert, size))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert float(losses.contrastive(outputs[order], expert[order], size)) == pytest.approx(value)
    assert float(losses.contrastive(outputs, 2 - expert, size)) == pytest.approx(value)
    scaled = outputs * torch.linspace(0.01, 9, 12, dtype=torch.float64)[:, None]
    assert float(losses.contrastive(scaled, expert, size)) == pytest.approx(value)
    m = 4
    assert value > math.log(m - 1)  # the least value there is


@pytest.mark.parametrize("case", ["zero", "tiny", "one pair", "one expert", "half"])
def test_contrastive_is_finite_where_there_is_nothing_to_compare(case: str) -> None:
    outputs, expert = numbers(6, 5), torch.arange(6) % 2
    outputs = {"zero": outputs * 0, "tiny": outputs * 1e-9, "one pair": outputs[:1], "half": outputs.half()}.get(
        case, outputs
    )
    expert = {"one expert": expert * 0, "one pair": expert[:1]}.get(case, expert)
    outputs = outputs.detach().requires_grad_()
    value = losses.contrastive(outputs, expert, torch.ones(len(outputs)))
    (found,) = torch.autograd.grad(value, outputs)
    assert value.isfinite()
    assert found.isfinite().all()
    assert (float(value) == 0) == (case != "half")


def test_a_step_on_the_contrastive_loss_parts_the_experts() -> None:
    outputs, expert = numbers(12, 6) * 0.3 + 1, torch.arange(12) % 2
    size = torch.ones(12)

    def likeness(u: Tensor) -> float:
        z = torch.nn.functional.normalize(u, dim=-1)
        return float((z[expert == 0] @ z[expert == 1].t()).mean())

    moved = outputs.clone().requires_grad_()
    for _ in range(100):
        (grad,) = torch.autograd.grad(losses.contrastive(moved, expert, size, temperature=0.5), moved)
        moved = (moved - 0.5 * grad).detach().requires_grad_()
    assert likeness(moved) < likeness(outputs) - 0.05


# ---- routers


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_token_logits_are_exact_in_16_bits_and_under_autocast() -> None:
    router = routers.Token(64, N, bias=True, std=None, generator=seeded())
    x = numbers(5, 64).to(torch.bfloat16)
    expected = x.double() @ router.weight.double().t() + router.bias.double()
    p = torch.softmax(expected, -1)
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            assert float((choose(router(x)).p.double() - p).abs().max()) < 1e-6
    low = router.to(torch.bfloat16)  # its weights are rounded then, and nothing more
    expected = torch.softmax(x.double() @ low.weight.double().t() + low.bias.double(), -1)
    assert float((choose(low(x)).p.double() - expected).abs().max()) < 1e-6


def test_sequence_gates_are_near_uniform_and_free_of_scale_and_padding() -> None:
    router = routers.Sequence(8, N, std=None, generator=seeded()).double()
    x, mask = numbers(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)
    p = torch.softmax(router(x, mask), -1)
    assert float((p - 1 / N).abs().max()) < 0.02
    assert torch.allclose(router(7 * x, mask), router(x, mask))
    left = torch.cat([torch.full((3, 2, 8), 9.0, dtype=x.dtype), x], 1)
    wide = torch.cat([torch.zeros(3, 2, dtype=torch.bool), mask], 1)
    assert torch.allclose(router(left, wide), router(x, mask))
    assert torch.allclose(router(x[1:2], mask[1:2])[0], router(x, mask)[1])
    assert torch.equal(router(x, mask & False), torch.zeros(3, N, dtype=x.dtype))


def test_task_routers_give_rows_by_task() -> None:
    for router in (
        routers.TaskEmbedding(3, N, 16, std=None, generator=seeded()),
        routers.TaskLogits(3, N, std=None, generator=seeded()),
    ):
        whole = router(torch.arange(3))
        assert whole.shape == (3, N)
        assert torch.equal(router(torch.tensor(2)), whole[2]) or torch.allclose(router(torch.tensor(2)), whole[2])
        for a, b in itertools.pairwise(whole):
            assert not torch.allclose(a, b, atol=1e-6)
    assert torch.equal(routers.TaskEmbedding(3, N, 16, std=0.0, generator=seeded()).weight, torch.zeros(N, 16))
