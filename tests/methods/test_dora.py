"""DoRA: its paper's identities, the norm without a dense matrix, what is kept and when it is measured anew, PEFT."""

import copy
import warnings
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import IDS, logits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import reparam
from reparam.core.base import Site
from reparam.core.registry import STORAGES
from reparam.io.peft import WEIGHTS
from reparam.methods.dora import DoRAUpdate
from reparam.methods.lora import LoRAUpdate
from reparam.methods.mixture.method import Mixture
from reparam.sites.linear import Linear
from reparam.weights.dense import DenseWeight

axes = pytest.mark.parametrize("axis", ["output", "input"])
stored = pytest.mark.parametrize("storage", STORAGES)


def layer(w: Tensor, *, r: int = 2, seed: int = 0, size: float = 0.3, **settings: Any) -> Linear:
    """A layer with this matrix, in its dtype, and a random update; no bias."""
    plain = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    plain.weight = nn.Parameter(w.clone())
    adapted = Linear.wrap(plain)
    method = reparam.DoRA(**{"r": r, "alpha": 2.0 * r, **settings})
    adapted.add("a", method.build(Site("layer", "linear", *w.shape), adapted.weight, None))
    adapted.active = "a"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.updates["a"].parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return adapted.double().eval() if w.dtype == torch.float64 else adapted.eval()


def update_of(adapted: Linear) -> DoRAUpdate:
    found = adapted.updates["a"]
    assert isinstance(found, DoRAUpdate)
    return found


def factors_of(adapted: Linear) -> tuple[nn.Parameter, nn.Parameter, float]:
    found = update_of(adapted).low_rank
    assert isinstance(found, LoRAUpdate)
    return found.A, found.B, found.scale


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def direction(adapted: Linear) -> Tensor:
    """W + s B A [O, I] in float64, dense."""
    A, B, s = factors_of(adapted)
    return adapted.weight.tensor().double() + s * (B.double() @ A.double())


def expected(adapted: Linear, *, detached: bool, dim: int = 1) -> Tensor:
    """W' in float64 as the paper has it, differentiable."""
    v = direction(adapted)
    norm = v.norm(dim=dim, keepdim=True)
    norm = norm.detach() if detached else norm
    return update_of(adapted).magnitude.double().unsqueeze(dim) * v / norm


def actual(adapted: Linear) -> Tensor:
    """W' [O, I], by applying it."""
    return adapted(torch.eye(adapted.weight.in_features, dtype=adapted.weight.dtype)).t()


# ---- the function


@pytest.mark.parametrize(
    ("axis", "m", "n", "result"),
    [
        ("output", [5.0, 5.0], [5.65685, 5.38516], [[3.53553, 3.53553], [1.85695, 4.64238]]),
        ("input", [3.0, 6.40312], [4.47214, 6.40312], [[2.68328, 4.0], [1.34164, 5.0]]),
    ],
)
def test_the_worked_example(axis: str, m: list[float], n: list[float], result: list[list[float]]) -> None:
    """W0 = [[3, 4], [0, 5]], A = [[1, 0]], B = [[1], [2]], s = 1."""
    adapted = layer(torch.tensor([[3.0, 4.0], [0.0, 5.0]]), r=1, alpha=1.0, norm_axis=axis, size=0)
    torch.testing.assert_close(update_of(adapted).magnitude.tolist(), m, rtol=1e-5, atol=0)
    A, B, _ = factors_of(adapted)
    with torch.no_grad():
        A.copy_(torch.tensor([[1.0, 0.0]]))
        B.copy_(torch.tensor([[1.0], [2.0]]))
    torch.testing.assert_close(direction(adapted).norm(dim=1 if axis == "output" else 0).tolist(), n, rtol=1e-5, atol=0)
    torch.testing.assert_close(actual(adapted), torch.tensor(result), rtol=1e-5, atol=0)


@axes
@given(outputs=st.integers(1, 9), inputs=st.integers(1, 9), r=st.integers(1, 4), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:LoRA. the rank exceeds")
def test_the_output_is_the_papers_equation(axis: str, outputs: int, inputs: int, r: int, seed: int) -> None:
    adapted, dim = layer(random(outputs, inputs), r=r, seed=seed, norm_axis=axis), 1 if axis == "output" else 0
    found = actual(adapted).detach()
    torch.testing.assert_close(found, expected(adapted, detached=True, dim=dim), rtol=1e-9, atol=1e-12)
    magnitude, v = update_of(adapted).magnitude, direction(adapted)
    torch.testing.assert_close(found.norm(dim=dim), magnitude.abs())  # ‖W'‖ = |m|
    along = torch.cosine_similarity(found, v, dim=dim)
    torch.testing.assert_close(along, magnitude.sign())  # the direction of W + sBA


@axes
def test_a_fresh_adapter_has_a_gain_of_exactly_one(axis: str) -> None:
    adapted = layer(random(7, 5, dtype=torch.float32), norm_axis=axis, size=0)
    x = random(4, 5, dtype=torch.float32)
    y = adapted(x)
    adapted.active = None
    assert torch.equal(y, adapted(x))


def test_magnitudes_of_the_direction_make_it_lora() -> None:
    adapted = layer(random(7, 5))
    with torch.no_grad():
        update_of(adapted).magnitude.copy_(direction(adapted).norm(dim=1))
    torch.testing.assert_close(actual(adapted), direction(adapted))


def test_the_length_of_the_direction_does_not_matter() -> None:
    """c (W + s B A) with the same m: scale W, and B, by c."""
    w = random(7, 5)
    once, twice = layer(w), layer(3 * w)
    with torch.no_grad():
        factors_of(twice)[1].copy_(3 * factors_of(once)[1])
        factors_of(twice)[0].copy_(factors_of(once)[0])
        update_of(twice).magnitude.copy_(update_of(once).magnitude)
    torch.testing.assert_close(actual(twice), actual(once))


def test_the_bias_is_not_scaled() -> None:
    adapted = layer(random(7, 5))
    x, bias = random(3, 5), random(7, seed=4)
    with_bias = update_of(adapted)(x, adapted.weight, bias)
    torch.testing.assert_close(with_bias, adapted(x) + bias)


def test_magnitudes_alone() -> None:
    adapted = layer(random(7, 5), magnitude_only=True)
    update = update_of(adapted)
    assert [name for name, _ in update.named_parameters()] == ["magnitude"]
    w = adapted.weight.tensor()
    torch.testing.assert_close(actual(adapted), (update.magnitude / w.norm(dim=1))[:, None] * w)
    adapted(random(3, 5)).sum().backward()
    assert update.magnitude.grad is not None


@pytest.mark.parametrize("gradient", ["detached", "exact"])
@axes
def test_rows_and_columns_of_zeros_are_plain_lora(gradient: str, axis: str) -> None:
    w = random(6, 5)
    (w if axis == "output" else w.t())[2] = 0
    adapted = layer(w, gradient=gradient, norm_axis=axis)
    torch.testing.assert_close(
        (actual(adapted) if axis == "output" else actual(adapted).t())[2],
        (direction(adapted) if axis == "output" else direction(adapted).t())[2],
    )
    actual(adapted).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in update_of(adapted).parameters())
    assert update_of(adapted).magnitude.grad[2] == 0  # type: ignore[index]
    with torch.no_grad():
        factors_of(adapted)[1].zero_()
    assert actual(adapted).isfinite().all()  # 0 / 0 in the formula


def test_what_is_not_finite_is_refused() -> None:
    w = random(3, 3, dtype=torch.float32)
    w[1, 1] = torch.inf
    with pytest.raises(ValueError, match="DoRA: layer: the norm of 1 rows is not finite"):
        layer(w)


def test_dropout_is_on_the_branch_alone_and_in_training_alone() -> None:
    adapted, x = layer(random(6, 5), dropout=0.5), random(50, 5)
    A, B, s = factors_of(adapted)
    gain = update_of(adapted).magnitude / direction(adapted).norm(dim=1)
    torch.testing.assert_close(adapted(x), x @ expected(adapted, detached=True).t())
    adapted.train()
    torch.manual_seed(0)
    found = adapted(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(found, gain * (x @ adapted.weight.tensor().t() + s * dropped @ A.t() @ B.t()))
    base = gain * (x @ adapted.weight.tensor().t())
    with torch.no_grad():
        B.zero_()
        update_of(adapted).magnitude.copy_(gain * adapted.weight.tensor().norm(dim=1))
    torch.testing.assert_close(adapted(x), base)  # W is applied to the whole input


# ---- the norm


@axes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 0.9999, 1 - 1e-6])
def test_the_norm_is_the_dense_one_also_where_the_update_cancels_the_matrix(
    axis: str, dtype: torch.dtype, share: float
) -> None:
    """s B A = -share W, but for the rest of W that is not of low rank; every row, or column, is hit."""
    u, v = random(40, 3), random(3, 30, seed=2)
    w = (u @ v + 1e-3 * random(40, 30, seed=3)).to(dtype)
    adapted = layer(w, r=3, alpha=3.0, norm_axis=axis)
    A, B, _ = factors_of(adapted)
    with torch.no_grad():
        A.copy_(v)
        B.copy_(-share * u)
    dim = 1 if axis == "output" else 0
    dense = direction(adapted).norm(dim=dim)
    found = update_of(adapted)._norms(adapted.weight).norm
    torch.testing.assert_close(found.double(), dense, rtol=1e-5 if dtype == torch.float32 else 1e-7, atol=0)


@pytest.mark.parametrize("size", [1e-3, 1e-1, 1.0, 30.0])
def test_the_norm_in_16_bits(size: float) -> None:
    adapted = layer(random(64, 48, dtype=torch.bfloat16), r=4, size=size)
    dense = direction(adapted).norm(dim=1)
    torch.testing.assert_close(update_of(adapted)._norms(adapted.weight).norm.double(), dense, rtol=5e-3, atol=0)


def test_a_total_cancellation_is_no_nan() -> None:
    w = random(4, 1) @ random(1, 3, seed=2)
    adapted = layer(w, r=1, alpha=1.0)
    A, B, _ = factors_of(adapted)
    with torch.no_grad():
        A.copy_(w[:1])
        B.copy_(-(w[:, :1] / w[:1, :1]))
    for parameter in update_of(adapted).parameters():
        assert parameter.isfinite().all()
    assert actual(adapted).isfinite().all()


@stored
@axes
def test_the_norm_on_every_storage_is_that_of_the_packed_values(axis: str, storage: str) -> None:
    adapted = layer(random(64, 64, dtype=torch.float32))
    weight = STORAGES[storage]().pack(random(64, 64, dtype=torch.float32))
    dim = 1 if axis == "output" else 0
    method = reparam.DoRA(r=2, norm_axis=axis)
    update = method.build(Site("layer", "linear", 64, 64), weight, None)
    torch.testing.assert_close(update.magnitude.double(), weight.dense().double().norm(dim=dim))
    adapted.repack(weight)
    adapted.updates["a"] = update
    assert isinstance(update.low_rank, LoRAUpdate)
    with torch.no_grad():
        update.low_rank.B.copy_(random(64, 2))
    dense = direction(adapted).norm(dim=dim)
    torch.testing.assert_close(update._norms(weight).norm.double(), dense, rtol=1e-5, atol=0)


def test_a_dense_matrix_is_never_made() -> None:
    """Nothing that is allocated in a step, forward and backward, is nearly as large as W."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, tuple | list) else [found]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in frozen:
                    self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
            return found

    for gradient in ("detached", "exact"):
        adapted = layer(random(600, 500, dtype=torch.float32), gradient=gradient).train()
        frozen = {adapted.weight.tensor().untyped_storage().data_ptr()}
        adapted(random(2, 500, dtype=torch.float32))  # ‖W‖² is measured, in blocks
        update_of(adapted).forget()
        with Largest() as largest:
            adapted(random(2, 500, dtype=torch.float32)).sum().backward()
        assert largest.numbers <= 4 * 600


# ---- gradients


@pytest.mark.parametrize("gradient", ["detached", "exact"])
@axes
@given(seed=st.integers(0, 99))
def test_gradients_are_those_of_autograd_on_the_dense_formula(gradient: str, axis: str, seed: int) -> None:
    adapted = layer(random(6, 5), gradient=gradient, norm_axis=axis, seed=seed)
    x = random(4, 5).requires_grad_()
    wanted = [x, *update_of(adapted).parameters()]
    weights = random(4, 6, seed=9)
    found = torch.autograd.grad((adapted(x) * weights).sum(), wanted)
    dense = expected(adapted, detached=gradient == "detached", dim=1 if axis == "output" else 0)
    torch.testing.assert_close(found, torch.autograd.grad((x @ dense.t() * weights).sum(), wanted))


def test_exact_gradients_have_no_part_along_the_direction() -> None:
    """⟨∂L/∂V, v⟩ = 0 for each row, seen through B = V A⁻¹ with a square A."""
    adapted = layer(random(6, 3), r=3, gradient="exact")
    A, B, s = factors_of(adapted)
    found = torch.autograd.grad((adapted(random(4, 3)) * random(4, 6, seed=9)).sum(), B)[0]
    to_v = found @ torch.linalg.inv(A.t()) / s  # ∂L/∂V, because ∂B = s ∂V Aᵀ
    assert ((to_v * direction(adapted)).sum(1).abs() < 1e-10 * to_v.norm(dim=1)).all()


def test_both_modes_give_the_magnitudes_the_same_gradient() -> None:
    found = []
    for gradient in ("detached", "exact"):
        adapted = layer(random(6, 5), gradient=gradient)
        adapted(random(4, 5)).square().sum().backward()
        found.append(update_of(adapted).magnitude.grad)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-6, 0.0])
def test_magnitudes_near_zero_keep_their_gradient(smallest: float) -> None:
    """The gain is divided out of the kept result only where that loses nothing."""
    adapted = layer(random(6, 5, dtype=torch.float32))
    with torch.no_grad():
        update_of(adapted).magnitude[3] = smallest
    x = random(40, 5, dtype=torch.float32)
    adapted(x).sum().backward()
    found = update_of(adapted).magnitude.grad
    dense = torch.autograd.grad((x.double() @ expected(adapted, detached=True).t()).sum(), update_of(adapted).magnitude)
    torch.testing.assert_close(found, dense[0], rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_those_of_differences() -> None:
    adapted = layer(random(4, 3))
    x = random(2, 3).requires_grad_()
    wanted = (x, update_of(adapted).magnitude)
    assert torch.autograd.gradgradcheck(lambda *_: adapted(x), wanted)


# ---- what is kept, and when it is measured anew


def measured(adapted: Linear) -> Tensor:
    """The output for a fixed input, with whatever is kept."""
    with torch.no_grad():
        return adapted(random(3, adapted.weight.in_features, dtype=adapted.weight.dtype))


def anew(adapted: Linear) -> Tensor:
    """The same from a copy that has kept nothing."""
    twin = copy.deepcopy(adapted)
    update_of(twin).forget()
    twin.weight.__dict__.pop("_squared_norms", None)
    return measured(twin)


def sgd(adapted: Linear, optimizer: Any, **settings: Any) -> None:
    stepper = optimizer(list(update_of(adapted).parameters()), lr=0.3, **settings)
    update_of(adapted).requires_grad_()
    adapted(random(3, 40, dtype=torch.float32)).square().sum().backward()
    stepper.step()


def write_base(adapted: Linear) -> None:
    w = adapted.weight.dense_or_none
    assert w is not None
    w.mul_(torch.linspace(1, 2, w.shape[1]))


CHANGES: dict[str, Any] = {
    "A in place": lambda a: factors_of(a)[0].mul_(2),
    "B in place": lambda a: factors_of(a)[1].mul_(2),
    "magnitude in place": lambda a: update_of(a).magnitude.mul_(2),
    "W in place": write_base,
    "W in another storage": lambda a: a.repack(STORAGES["int8"]().pack(a.weight.tensor())),
    "W exchanged": lambda a: a.repack(DenseWeight(a.weight.tensor() * torch.linspace(1, 2, 40))),
    "state dict": lambda a: a.load_state_dict({k: 2 * v + 0.1 for k, v in a.state_dict().items()}),
    "state dict, assigned": lambda a: a.load_state_dict(
        {k: 2 * v + 0.1 for k, v in a.state_dict().items()}, assign=True
    ),
    "through 16 bits": lambda a: a.bfloat16().float(),
    "SGD": lambda a: sgd(a, torch.optim.SGD),
    "AdamW": lambda a: sgd(a, torch.optim.AdamW, foreach=True),
    "fused AdamW": lambda a: sgd(a, torch.optim.AdamW, fused=True),
    "paged AdamW": lambda a: sgd(a, reparam.optim.PagedAdamW),
}


@pytest.mark.parametrize("change", CHANGES)
@axes
def test_a_change_is_seen(axis: str, change: str) -> None:
    adapted = layer(random(30, 40, dtype=torch.float32), norm_axis=axis)
    before = measured(adapted)
    assert torch.equal(measured(adapted), before)
    with torch.set_grad_enabled("step" in change or "SGD" in change or "AdamW" in change):
        CHANGES[change](adapted)
    after = measured(adapted)
    assert (after - before).abs().max() > 1e-4
    assert torch.equal(after, anew(adapted))


def test_nothing_is_measured_twice_without_a_change() -> None:
    """Within gradient accumulation, in eval mode, and when a trainer says `train()` before each batch."""
    adapted = layer(random(6, 5)).train()
    update, x = update_of(adapted), random(3, 5)
    adapted(x).sum().backward()
    kept = update._kept
    assert kept is not None
    adapted.train()
    adapted(x).sum().backward()
    assert update._kept is kept
    adapted.eval()
    adapted(x)
    other = update._kept
    with torch.no_grad():
        adapted(2 * x)
        with torch.inference_mode():
            adapted(x)
    assert update._kept is other


def test_what_inference_mode_measured_can_be_trained_on() -> None:
    adapted = layer(random(6, 5))
    with torch.inference_mode():
        adapted(random(3, 5))
    adapted(random(3, 5)).sum().backward()
    assert update_of(adapted).magnitude.grad is not None


def test_an_optimizer_that_writes_past_the_version_counters_is_noticed() -> None:
    """As fused ones do, and kernels of other libraries."""
    adapted = layer(random(6, 5, dtype=torch.float32))

    class Raw(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data += 0.3

    optimizer = Raw(update_of(adapted).parameters(), lr=0.1)
    before = measured(adapted)
    optimizer.step()
    assert not torch.equal(measured(adapted), before)
    assert torch.equal(measured(adapted), anew(adapted))


def test_selecting_back_and_forth_and_two_adapters_on_one_site() -> None:
    model = models.llama()
    for name, seed in (("a", 1), ("b", 2)):
        adapter = reparam.attach(model, reparam.DoRA(r=2), name=name)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for p in adapter.parameters():
                p += 0.2 * torch.randn_like(p)
    found = {}
    for name in ("a", "b", None, "a", "b"):
        reparam.select(model, name)
        y = logits(model)
        assert torch.equal(found.setdefault(name, y), y)
    assert not torch.equal(found["a"], found["b"])


@axes
def test_pickled_and_copied_modules_keep_working(axis: str) -> None:
    adapted = layer(random(6, 5), norm_axis=axis)
    y = measured(adapted)
    twin = copy.deepcopy(adapted)
    assert torch.equal(measured(twin), y)
    with torch.no_grad():
        factors_of(twin)[1].mul_(2)
    assert torch.equal(measured(twin), anew(twin))
    assert torch.equal(measured(adapted), y)


@axes
@pytest.mark.parametrize("settings", [{}, {"gradient": "exact"}, {"magnitude_only": True}], ids=str)
def test_compiled_without_graph_breaks_in_eval_and_training(axis: str, settings: dict[str, Any]) -> None:
    torch.compiler.reset()
    adapted = layer(random(6, 5, dtype=torch.float32), norm_axis=axis, **settings)
    x = random(3, 5, dtype=torch.float32)
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), adapted(x), rtol=1e-5, atol=1e-6)
        for p in update_of(adapted).parameters():
            p.mul_(1.5)
        write_base(adapted)
        torch.testing.assert_close(compiled(x), adapted(x), rtol=1e-5, atol=1e-6)
    wanted = list(update_of(adapted).parameters())
    one, two = (torch.autograd.grad(run(x).square().sum(), wanted) for run in (adapted, compiled))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_a_compiled_graph_stops_where_it_would_have_to_measure_directly() -> None:
    torch.compiler.reset()
    u, v = random(6, 1, dtype=torch.float32), random(1, 5, seed=2, dtype=torch.float32)
    adapted = layer(u @ v, r=1, alpha=1.0)
    with torch.no_grad():
        factors_of(adapted)[0].copy_(v)
        factors_of(adapted)[1].copy_(-(1 - 1e-4) * u)
        assert adapted(random(3, 5, dtype=torch.float32)).isfinite().all()
        with pytest.raises(RuntimeError, match="an update nearly cancels a row of W"):
            torch.compile(adapted, fullgraph=True, backend="aot_eager")(random(3, 5, dtype=torch.float32))
    torch.compiler.reset()


# ---- in models


def test_magnitudes_move_in_a_16_bit_model() -> None:
    """By steps that bfloat16 would round away: a float32 master."""
    model = models.llama().bfloat16()
    adapter = reparam.attach(model, reparam.DoRA(r=2))
    magnitudes = [p for name, p, role in adapter.named_parameters() if role == "gain"]
    assert len(magnitudes) == 14
    assert all(p.dtype == torch.float32 for p in magnitudes)
    before = [p.detach().clone() for p in magnitudes]
    optimizer = torch.optim.SGD(magnitudes, lr=1e-5)
    models.loss(model).backward()
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(magnitudes, before, strict=True)]
    rounded = [torch.equal(p.bfloat16(), b.bfloat16()) for p, b in zip(magnitudes, before, strict=True)]
    assert all(moved)
    assert all(rounded)


@stored
@pytest.mark.parametrize("settings", [{}, {"norm_axis": "input"}, {"magnitude_only": True}], ids=str)
def test_merging_and_mixed_batches_on_every_storage(storage: str, settings: dict[str, Any]) -> None:
    model = models.llama()
    if storage != "dense":
        reparam.pack(model, storage)
    for name in ("a", "b"):
        method = reparam.DoRA(r=3, **settings) if name == "a" else reparam.LoRA(r=2)
        adapter = reparam.attach(model, method, name=name)
        with torch.no_grad():
            for p in adapter.parameters():
                p += 0.1
    alone = {}
    for name in ("b", None, "a"):
        reparam.select(model, name)
        alone[name] = logits(model)
    rows = ["a", None, "b"]
    with torch.no_grad(), reparam.select(model, rows):
        mixed = logits(model)
    for row, name in enumerate(rows):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)
    report = reparam.merge(model)
    assert min(report.survival().values()) > 0.999
    torch.testing.assert_close(logits(model), alone["a"], rtol=1e-4, atol=1e-5)


def test_it_trains_one_number_for_each_output_more_than_lora() -> None:
    """LLaMA-7B with q, k, v, up and down: 876,544 (paper, Table 1: + 0.01 %)."""
    count = {}
    for method in (reparam.LoRA(r=32), reparam.DoRA(r=32)):
        with torch.device("meta"):
            square = {name: nn.Linear(4096, 4096) for name in "qkv"}
            model = nn.ModuleDict({**square, "up": nn.Linear(4096, 11008), "down": nn.Linear(11008, 4096)})
        adapter = reparam.attach(model, method)
        count[method.name] = 32 * sum(p.numel() for p in adapter.parameters())
    assert count["dora"] - count["lora"] == 876_544


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "none"}, "gradient='none': expected one of detached, exact"),
        ({"norm_axis": 1}, "norm_axis=1: expected one of output, input"),
        ({"r": 0}, "r=0: a rank is a whole number of at least 1"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reparam.DoRA(**settings)


# ---- PEFT as the judge


def theirs(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_dora=True)
        )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for p in wrapped.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    return wrapped


def test_outputs_and_gradients_are_pefts(tmp_path: Path) -> None:
    judge = theirs(models.llama())
    judge.save_pretrained(str(tmp_path))
    model = models.llama()
    adapter = reparam.load(model, tmp_path).requires_grad_()
    assert adapter.method.name == "dora"
    torch.testing.assert_close(logits(model), logits(judge), rtol=1e-4, atol=1e-5)
    models.loss(model).backward()
    judge(input_ids=IDS, labels=IDS).loss.backward()
    expected = {
        name.replace(".default", "").removeprefix("base_model.model."): p.grad
        for name, p in judge.named_parameters()
        if p.grad is not None
    }
    names = {"low_rank.A": "lora_A.weight", "low_rank.B": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
    found = 0
    for name, p, _ in adapter.named_parameters():
        site, part = next((name.removesuffix("." + end), new) for end, new in names.items() if name.endswith(end))
        torch.testing.assert_close(p.grad, expected[f"{site}.{part}"], rtol=1e-3, atol=1e-6)
        found += 1
    assert found == len(expected)


def test_rows_of_a_mixed_batch_that_peft_refuses(tmp_path: Path) -> None:
    judge = theirs(models.llama())
    judge.save_pretrained(str(tmp_path))
    expected = logits(judge)
    with pytest.raises(ValueError, match="DoRA"):
        judge.eval()(input_ids=IDS, adapter_names=["default"] * len(IDS))
    model = models.llama()
    reparam.load(model, tmp_path, name="a")
    with torch.no_grad(), reparam.select(model, ["a"] * len(IDS)):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_peft_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    theirs(models.llama()).save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith("down_proj.lora_magnitude_vector"))
    rest = {k: v for k, v in tensors.items() if k != key}
    save_file(rest, tmp_path / WEIGHTS)
    with pytest.raises(reparam.FormatError, match=f"missing {key}"):
        reparam.load(models.llama(), tmp_path)
    save_file({**tensors, key: tensors[key][:-1]}, tmp_path / WEIGHTS)
    with pytest.raises(reparam.FormatError, match="magnitude has shape"):
        reparam.load(models.llama(), tmp_path)
    save_file({**tensors, key.replace("down_proj", "gate_proj"): tensors[key].clone()}, tmp_path / WEIGHTS)
    with pytest.raises(reparam.FormatError, match=r"unknown tensor .*gate_proj\.lora_magnitude_vector"):
        reparam.load(models.llama(), tmp_path)


def test_peft_files_for_embeddings_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True)
    peft.get_peft_model(models.llama(), config).save_pretrained(str(tmp_path))
    with pytest.raises(reparam.FormatError, match="on an embedding has a magnitude for each column"):
        reparam.load(models.llama(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "targets", "message"),
    [
        ({"norm_axis": "input"}, ["q_proj"], "norm_axis='input'"),
        ({"magnitude_only": True}, ["q_proj"], "magnitudes alone"),
        ({}, ["embed_tokens"], "the embedding model.embed_tokens"),
    ],
)
def test_what_peft_has_no_equal_of(settings: dict[str, Any], targets: list[str], message: str, tmp_path: Path) -> None:
    adapter = reparam.attach(models.llama(), reparam.DoRA(r=2, **settings), targets=targets)
    with pytest.raises(reparam.FormatError, match=message):
        adapter.save(tmp_path / "out", format="peft")
    adapter.save(tmp_path / "own")
    assert reparam.load(models.llama(), tmp_path / "own").method == adapter.method


def test_the_axis_is_in_our_file(tmp_path: Path) -> None:
    """On a square layer the shapes would not tell."""
    model = nn.Sequential(nn.Linear(4, 4))
    adapter = reparam.attach(model, reparam.DoRA(r=1, norm_axis="input"), targets=["0"])
    adapter.save(tmp_path / "own")
    again = copy.deepcopy(model)
    reparam.remove(again, "default")
    assert reparam.load(again, tmp_path / "own").method.settings()["norm_axis"] == "input"


def test_magnitudes_lie_over_a_static_mixture() -> None:
    """Whatever has factors without a gain will do; what is kept is measured anew when the mixture's gates move."""
    w = random(6, 5)
    plain = nn.Linear(5, 6, bias=False, dtype=torch.float64)
    plain.weight = nn.Parameter(w.clone())
    adapted = Linear.wrap(plain)
    site = Site("layer", "linear", 6, 5)
    mixture = Mixture(n=3, r=2, router="static", scope="module").build(site, adapted.weight, None)
    adapted.add("a", reparam.DoRA().over(mixture.double(), site, adapted.weight))
    adapted.active = "a"
    adapted.double().eval()
    x = random(4, 5, seed=2)
    for seed in (3, 4):
        with torch.no_grad():
            for number, parameter in enumerate(adapted.updates["a"].parameters()):
                parameter += 0.3 * random(*parameter.shape, seed=10 * seed + number)
        update = update_of(adapted)
        assert update.low_rank is not None
        moved = update.low_rank.factors(adapted.weight).apply(w)
        expected = (update.magnitude / moved.norm(dim=1))[:, None] * moved
        with torch.no_grad():
            assert torch.allclose(adapted(x), x @ expected.T, atol=1e-10)
            assert torch.allclose(update.factors(adapted.weight).apply(w), expected, atol=1e-10)
