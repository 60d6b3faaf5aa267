"""A frozen matrix as one op: results, tensors kept for backward, and changes of dtype."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled import FULL, in_turn
from torch import Tensor, nn

import reparam
from reparam import NF4, Int8
from reparam.core.base import Storage
from reparam.kernels.nf4 import dequantize
from reparam.weights.quantized import QuantizedWeight, floats

STORAGES = [NF4(), NF4(32, double=False), NF4(4096), Int8()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPS = torch.ops.reparam
every = pytest.mark.parametrize("storage", STORAGES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(storage: Storage, *shape: int, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    weight = storage.quantize(normal(*shape, dtype=dtype))
    assert isinstance(weight, QuantizedWeight)
    return weight


def operands(weight: Any) -> tuple[str, list[Any]]:
    """The name of a weight's storage, and the operands of its ops."""
    if isinstance(weight.storage, Int8):
        return "int8", [weight.codes, floats(weight.absmax), list(weight.shape)]
    return "nf4", [weight.codes, *weight.statistics, weight.block, list(weight.shape)]


def tensors(weight: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weight.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor, in float64."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def pairs(run: Callable[..., Tensor], x: Tensor, bias: Tensor | None, weights: Tensor) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    wanted = [t.detach().clone().requires_grad_() for t in (x, bias) if t is not None]
    y = run(*wanted)
    return [y, *torch.autograd.grad((y * weights).sum(), wanted)]


# ---- the ops


@pytest.mark.parametrize(("storage", "dtype"), in_turn(STORAGES, DTYPES), ids=str)
def test_opcheck(storage: Storage, dtype: torch.dtype) -> None:
    name, parts = operands(quantized(storage, 9, 33, dtype=dtype))
    x, g, bias = (normal(*shape, dtype=dtype).requires_grad_() for shape in ((2, 3, 33), (4, 9), (9,)))
    torch.library.opcheck(getattr(OPS, f"{name}_linear").default, (x, *parts, bias))
    torch.library.opcheck(getattr(OPS, f"{name}_linear").default, (x[0, 0], *parts, None))
    torch.library.opcheck(getattr(OPS, f"{name}_linear_grad").default, (g, *parts))


@dtypes
@pytest.mark.parametrize("double", [False, True])
def test_opcheck_of_packing_and_unpacking(double: bool, dtype: torch.dtype) -> None:
    w = normal(9, 33, dtype=dtype)
    weight: Any = NF4(double=double).quantize(w)
    torch.library.opcheck(OPS.nf4_quantize.default, (w, 64))
    for first in (0, 2):
        out = torch.empty(150, dtype=dtype)
        torch.library.opcheck(OPS.nf4_dequantize_.default, (out, weight.codes, *weight.statistics, 64, first))


# ---- what it computes

SHAPES = [(1, 1), (1, 70), (70, 1), (9, 33), (64, 64), (200, 130)]
LEADING = [(), (1,), (5,), (2, 3), (2, 1, 3)]


@every
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_output_and_gradients_are_those_of_the_dense_matrix(
    shape: tuple[int, int], dtype: torch.dtype, storage: Storage
) -> None:
    """In float64, with the matrix rounded to the dtype of x, as a 16-bit model has it."""
    weight = quantized(storage, *shape)
    W = weight.dense().to(dtype).double()
    small = 4 * torch.finfo(dtype).eps
    for leading in LEADING:
        x = normal(*leading, shape[1], seed=1, dtype=dtype)
        for bias in (None, normal(shape[0], seed=2, dtype=dtype)):
            scale = torch.linspace(-1, 2, leading[0] if leading else 1, dtype=dtype)
            weights = scale.view(-1, *[1] * len(leading)).expand(*leading, shape[0]) if leading else scale
            found = pairs(weight, x, bias, weights)
            exact = pairs(lambda x, bias=None: nn.functional.linear(x, W, bias), x.double(),
                          None if bias is None else bias.double(), weights.double())  # fmt: skip
            assert all(f.dtype == dtype for f in found)
            assert all(error(f, e) < small for f, e in zip(found, exact, strict=True))


@every
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(storage: Storage) -> None:
    weight = quantized(storage, 9, 33)
    for leading in ((0,), (2, 0), (0, 3)):
        y, g_x, g_bias = pairs(weight, torch.ones(*leading, 33), torch.ones(9), torch.ones(*leading, 9))
        assert (y.shape, g_x.shape) == ((*leading, 9), (*leading, 33))
        assert torch.equal(g_bias, torch.zeros(9))


@every
def test_gradients_of_gradients(storage: Storage) -> None:
    weight = quantized(storage, 5, 7)
    x, bias = (normal(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 7), (5,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.autograd.gradcheck(weight, (x, bias))
        assert torch.autograd.gradgradcheck(lambda x, bias: weight(x, bias).sin(), (x, bias))


@pytest.mark.parametrize("storage", [NF4(), NF4(4096), Int8()], ids=str)
@pytest.mark.parametrize(
    "shape", [(3100, 1023), (2050, 1024), (61, 40001), (5, 600_000), (70_000, 33), (1025, 2049)], ids=str
)
def test_a_matrix_in_pieces_is_the_whole(shape: tuple[int, int], storage: Storage) -> None:
    """More than a million entries are dequantized in pieces, whose sizes are no multiples of a block."""
    weight = quantized(storage, *shape)
    W = weight.dense().double()
    x, g = normal(2, shape[1], seed=1), normal(2, shape[0], seed=2)
    y, g_x = pairs(weight, x, None, g)
    assert error(y, x.double() @ W.T) < 1e-5
    assert error(g_x, g.double() @ W) < 1e-5
    rows = normal(1, shape[1], seed=3)
    assert error(weight(rows, torch.ones(shape[0])), rows.double() @ W.T + 1) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_the_pieces_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    """The gradient of x is a sum over all pieces: its error is that of one product and one rounding."""
    weight = quantized(Int8(), 16384, 1024)
    g = normal(4, 16384).to(dtype)
    _, found = pairs(weight, normal(4, 1024, dtype=dtype), None, g)
    exact = g.double() @ weight.dense().double()
    assert error(found, exact) < 1.35 * error(g @ weight.dense().to(dtype), exact)


@every
def test_autocast_decides_the_dtype_as_for_a_dense_layer(storage: Storage) -> None:
    weight = quantized(storage, 9, 33)
    dense = nn.Linear(33, 9)
    dense.weight = nn.Parameter(weight.dense())
    bias = dense.bias.detach()
    for dtype in DTYPES:
        x = normal(2, 33, dtype=dtype)
        for low in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", low):
                y, g_x, g_bias = pairs(weight, x, bias.to(dtype), torch.ones(9, dtype=dtype))
                assert y.dtype == (dtype if dtype == torch.float64 else dense(x).dtype)
            assert (g_x.dtype, g_bias.dtype) == (dtype, dtype)
            assert error(g_x, weight.dense().sum(0).expand(2, 33)) < 0.05


@every
@pytest.mark.parametrize("x", [torch.ones(2, 32), torch.ones(2, 66), torch.ones(33, dtype=torch.int64)], ids=str)
def test_an_input_that_does_not_fit_is_refused(x: Tensor, storage: Storage) -> None:
    with pytest.raises(ValueError, match=r"expected floating-point numbers \[\.\.\., 33\], got "):
        quantized(storage, 9, 33)(x)


@every
@settings(max_examples=15)
@given(outputs=st.integers(1, 80), inputs=st.integers(1, 80), batch=st.integers(0, 9), seed=st.integers(0, 99))
def test_an_input_that_is_not_contiguous_gives_the_same(
    storage: Storage, outputs: int, inputs: int, batch: int, seed: int
) -> None:
    weight = quantized(storage, outputs, inputs)
    x, g = normal(batch, 3, inputs, seed=seed), normal(batch, 3, outputs, seed=seed + 1)
    for view in (x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT, x[:, :1].expand(-1, 3, -1)):
        found = pairs(weight, view, None, g.mT.contiguous().mT)
        expected = pairs(weight, view.contiguous(), None, g)
        assert all(error(f, e) < 1e-6 for f, e in zip(found, expected, strict=True))


# ---- what is kept


@every
def test_nothing_is_kept_for_backward_but_what_is_there_anyway(storage: Storage) -> None:
    """Neither x nor a dequantized W: every saved tensor is in the weight's own memory."""
    weight = quantized(storage, 300, 100)
    own = {p.untyped_storage().data_ptr() for p in weight.parameters()}
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x, bias = normal(50, 100).requires_grad_(), normal(300).requires_grad_()
    for dtype in (None, torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                y = weight(x, bias)
            y.sum().backward()
        assert saved
        assert {t.untyped_storage().data_ptr() for t in saved} <= own
        saved.clear()


def test_unpacking_over_what_a_backward_needs_is_noticed() -> None:
    weight: Any = quantized(NF4(), 4, 64)
    leaf = torch.zeros(256, requires_grad=True)
    y = leaf.tanh()  # its backward needs its result
    with torch.no_grad():
        dequantize(weight.codes, weight.statistics, block=64, count=256, dtype=y.dtype, out=y)
    assert torch.equal(y.view(4, 64), weight.dense())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every
def test_nothing_of_the_weight_trains_and_no_byte_changes(storage: Storage) -> None:
    weight = quantized(storage, 30, 40)
    before = tensors(weight)
    optimizer = torch.optim.AdamW(weight.parameters(), lr=1.0, weight_decay=0.5)
    weight.train()
    weight(normal(5, 40).requires_grad_()).square().sum().backward()
    optimizer.step()
    assert same(tensors(weight), before)
    assert all(p.grad is None and not p.requires_grad for p in weight.parameters())


# ---- dtypes, copies, files


@every
@pytest.mark.parametrize("way", ["to", "half", "bfloat16", "double", "through another"])
def test_a_change_of_dtype_changes_results_and_no_stored_bit(way: str, storage: Storage) -> None:
    """Also as a part of a model, and after converting back: nothing is lost."""
    weight = quantized(storage, 30, 41)
    before, whole = tensors(weight), weight.dense()
    model = nn.Sequential(weight)
    moved: dict[str, tuple[Callable[[], nn.Module], torch.dtype]] = {
        "to": (lambda: model.to(torch.bfloat16), torch.bfloat16),
        "half": (lambda: model.half(), torch.float16),
        "bfloat16": (lambda: weight.bfloat16(), torch.bfloat16),
        "double": (lambda: model.double(), torch.float64),
        "through another": (lambda: model.to(torch.float16).to("cpu", torch.float32), torch.float32),
    }
    change, dtype = moved[way]
    change()
    assert same(tensors(weight), before)
    assert torch.equal(weight.dense(), whole)
    assert weight.dtype == dtype
    assert torch.equal(weight.tensor(), whole.to(dtype))
    assert weight.rows(torch.tensor([3])).dtype == dtype
    assert weight(normal(2, 41, dtype=dtype)).dtype == dtype


@every
def test_a_state_dict_goes_round(storage: Storage) -> None:
    weight, other = quantized(storage, 30, 41), storage.quantize(torch.ones(30, 41))
    assert not torch.equal(other.dense(), weight.dense())
    assert "like" not in weight.state_dict()
    other.load_state_dict(weight.state_dict())
    assert torch.equal(other.dense(), weight.dense())
    with pytest.raises(RuntimeError, match="size mismatch"):
        storage.quantize(torch.ones(30, 43)).load_state_dict(weight.state_dict())


@every
def test_a_copy_is_a_weight_of_its_own(storage: Storage) -> None:
    weight = quantized(storage, 30, 41).bfloat16()
    twin = copy.deepcopy(weight)
    whole = weight.dense()
    assert torch.equal(twin.dense(), whole)
    assert (twin.dtype, twin.storage) == (weight.dtype, weight.storage)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(weight.dense(), whole)


@pytest.mark.parametrize("storage", STORAGES if FULL else [NF4(), Int8()], ids=str)
def test_a_compiled_layer_gives_the_same_output_and_gradients(storage: Storage) -> None:
    """In one graph; with torch's inductor if a C++ compiler is installed."""
    model = nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 3))
    reparam.quantize(model, storage, targets="0")
    adapter = reparam.attach(model, reparam.LoRA(r=2), targets="0")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if has_compiler() else "aot_eager")
    for leading in ((5,), (2, 3)):
        x = normal(*leading, 40).requires_grad_()
        results = []
        for run in (model, compiled):
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *adapter.parameters()])])
        assert all(error(f, e) < 1e-5 for e, f in zip(*results, strict=True))
    torch.compiler.reset()


def has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lora_on_a_quantized_16_bit_layer_keeps_its_input_once_and_as_it_is(dtype: torch.dtype) -> None:
    """The float32 parameters are cast to the input's dtype, and not the input to float32."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False)).to(dtype)
    reparam.quantize(model, "nf4", targets="0")
    adapter = reparam.attach(model, reparam.LoRA(r=4), targets="0")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.dtype]] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor.dtype)
        return tensor

    x = torch.randn(1024, 256).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model.train()(x)
    activations = [size for place, (size, _) in kept.items() if place not in own]
    assert sum(activations) < 1.05 * x.nbytes
    assert torch.float32 not in {kind for place, (_, kind) in kept.items() if place not in own}
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())
