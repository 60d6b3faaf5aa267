"""NF4 in Triton: every kernel against the torch reference, on a GPU or in Triton's interpreter, and compiled for GPUs.

The tests marked `gpu` run on a CUDA device. Without one they run in a process of their own with TRITON_INTERPRET=1,
which must be set before Triton is imported; there the device is the CPU. The interpreter accepts code that
the compiler does not, so the kernels are also compiled to machine code, which needs no GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sampled import FULL, pairs
from torch import Tensor

from reparam.kernels.nf4_reference import compress_scales, dequantize_reference, quantize_reference
from reparam.kernels.nf4_tables import BLOCKS, DYNAMIC, THRESHOLDS, TINY, Statistics

pytest.importorskip("triton")
from reparam.kernels import nf4_gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COUNTS = [1, 63, 4097, 12346]
SHAPES = [(1, 1), (5, 33), (2, 5001), (4, 2050)]
IN_TURN = INTERPRETED and not FULL  # the interpreter takes some of the combinations


def on_device(test: object) -> object:
    """Mark a test that launches kernels."""
    there = INTERPRETED or torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(not there, reason="no CUDA device")(test))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers that depend only on the shape."""
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)


def stored(w: Tensor, block: int, *, double: bool) -> tuple[Tensor, Statistics]:
    """`w` quantized by the torch reference."""
    codes, absmax = quantize_reference(w, block)
    return codes, compress_scales(absmax) if double else Statistics(absmax)


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 converted to `dtype`. The interpreter truncates bfloat16, devices round (Triton 3.7)."""
    if INTERPRETED and dtype is torch.bfloat16:
        exact = (exact.view(torch.int32) & -0x10000).view(torch.float32)
    return exact.to(dtype)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_quantizing_gives_the_bytes_of_the_reference(block: int, dtype: torch.dtype) -> None:
    """In turn, each block and each dtype meet all numbers of elements."""
    turn = BLOCKS.index(block) + DTYPES.index(dtype)
    for count in [COUNTS[turn % 4], COUNTS[(turn + 1) % 4]] if IN_TURN else COUNTS:
        w = random(count, dtype=dtype)
        codes, absmax = nf4_gpu.quantize(w, block)
        expected = quantize_reference(w, block)
        assert torch.equal(codes, expected[0])
        assert torch.equal(absmax, expected[1])


@on_device
def test_ties_go_to_the_lower_code_and_neighbors_do_not() -> None:
    """Each threshold and its two neighboring numbers, in a block whose magnitude is 1."""
    near = [torch.nextafter(THRESHOLDS, torch.tensor(to)) for to in (-2.0, 2.0)]
    w = torch.cat([torch.ones(1), THRESHOLDS, *near]).to(DEVICE)
    assert torch.equal(nf4_gpu.quantize(w, 64)[0], quantize_reference(w, 64)[0])


@on_device
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-39, TINY, 1e38], ids=str)
def test_blocks_of_zeros_and_at_the_ends_of_float32(scale: float) -> None:
    """Zeros get the code of zero; a block too small for a finite reciprocal equals the reference."""
    w = torch.cat([random(64).clamp(-1, 1) * scale, random(65)])
    codes, absmax = nf4_gpu.quantize(w, 64)
    expected = quantize_reference(w, 64)
    assert torch.equal(codes, expected[0])
    assert torch.equal(absmax, expected[1])
    if scale == 0:
        assert set(codes[:32].tolist()) == {0x77}
        assert float(absmax[0]) == 0
    found = torch.empty(129, device=DEVICE)
    nf4_gpu.dequantize(found, codes, Statistics(absmax), 64)
    expected_values = dequantize_reference(codes, Statistics(absmax), block=64, count=129, dtype=torch.float32)
    assert torch.equal(found, expected_values)


@on_device
@pytest.mark.parametrize(("block", "double", "dtype"), pairs(BLOCKS, [False, True], DTYPES, full=not IN_TURN), ids=str)
def test_dequantizing_gives_the_bits_of_the_reference(block: int, double: bool, dtype: torch.dtype) -> None:
    """In turn, each block and each dtype meet all numbers of elements."""
    turn = BLOCKS.index(block) + DTYPES.index(dtype) + double
    for count in [COUNTS[turn % 4]] if IN_TURN else COUNTS:
        codes, stats = stored(random(count), block, double=double)
        found = torch.full((count,), float("nan"), dtype=dtype, device=DEVICE)
        nf4_gpu.dequantize(found, codes, stats, block)
        exact = dequantize_reference(codes, stats, block=block, count=count, dtype=torch.float32)
        assert torch.equal(found, rounded(exact, dtype))


@on_device
@pytest.mark.parametrize("first", [0, 1, 300])
def test_many_blocks_of_statistics_an_own_map_and_a_part_from_the_middle(first: int) -> None:
    """Three blocks of 256 magnitudes; a map that came with a file; codes that begin at an odd address; an odd count."""
    codes, stats = stored(random(600 * 32), 32, double=True)
    assert stats.nested is not None
    assert len(stats.nested) == 3
    own = stats._replace(map=(DYNAMIC * 0.5).to(DEVICE))
    for case, part in ((stats, codes), (own, codes), (Statistics(random(600).abs()), codes[5:])):
        whole = dequantize_reference(part, case, block=32, count=len(part) * 2, dtype=torch.float32)
        found = torch.empty(3, 1233, device=DEVICE)
        nf4_gpu.dequantize(found, part, case, 32, first)
        assert torch.equal(found.view(-1), whole[first * 32 :][: 3 * 1233])


@on_device
@pytest.mark.parametrize(("block", "double", "shape"), pairs(BLOCKS, [False, True], SHAPES, full=not IN_TURN), ids=str)
def test_the_product_equals_the_unpacked_one(block: int, double: bool, shape: tuple[int, int]) -> None:
    """Compared in float64 with the reference's matrix, up to float32 rounding of sums and of the result."""
    outputs, inputs = shape
    codes, stats = stored(random(outputs, inputs), block, double=double)
    exact = dequantize_reference(codes, stats, block=block, count=outputs * inputs, dtype=torch.float32)
    # All numbers of rows and all dtypes are met, though not with every shape and block.
    cases = [(1 + (block + inputs) % 8, DTYPES[inputs % 3]), (1, torch.bfloat16)]
    for rows, dtype in [cases[(BLOCKS.index(block) + SHAPES.index(shape)) % 2]] if IN_TURN else cases:
        x = random(rows, inputs, dtype=dtype)
        found = nf4_gpu.matvec(x, codes, stats, block, shape)
        assert found.dtype is dtype
        assert found.shape == (rows, outputs)
        expected = x.double() @ exact.view(shape).double().T
        size = float((x.double().abs() @ exact.view(shape).double().abs().T).max())
        torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6 * size)


@on_device
@pytest.mark.parametrize("rows", range(1, nf4_gpu.MOST_ROWS + 1))
def test_a_row_does_not_depend_on_the_others(rows: int) -> None:
    codes, stats = stored(random(6, 1100), 64, double=True)
    x = random(rows, 1100)
    clean = nf4_gpu.matvec(x, codes, stats, 64, (6, 1100))
    assert torch.equal(nf4_gpu.matvec(x.t().contiguous().t(), codes, stats, 64, (6, 1100)), clean)
    for row in range(rows):
        spoilt = torch.full_like(x, float("nan"))
        spoilt[row] = x[row]
        assert torch.equal(nf4_gpu.matvec(spoilt, codes, stats, 64, (6, 1100))[row], clean[row])


# ---- without a GPU


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_all_of_the_above_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command.append(__file__)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert re.search(r"\d\d passed", run.stdout)
    assert "skipped" not in run.stdout


TYPES = dict.fromkeys(("w", "x", "y", "out"), "*bf16") | {"codes": "*u8"}
TYPES |= dict.fromkeys(("code", "thresholds", "absmax", "nested", "offset", "map"), "*fp32")
TYPES |= dict.fromkeys(("n", "size", "rows", "inputs", "outputs", "first"), "i32")
COMPILED = [
    ("_quantize", 64, {"G": 64}),
    ("_quantize", 4096, {"G": 1}),
    ("_dequantize", 64, {"L": 64, "G": 64}),
    ("_dequantize", 4096, {"L": 4096, "G": 1}),
    ("_matvec", 64, {"L": 64, "G": 16, "M": 1, "rows": 1}),
    ("_matvec", 4096, {"L": 1024, "G": 1, "M": 8}),
    ("_matvec", 32, {"L": 32, "G": 32, "M": 4, "inputs": 1}),
]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "double"), [(80, False), (90, True)])
def test_the_kernels_compile(
    capability: int, double: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """To machine code with exact division, rounding to bfloat16, and no fused operations where bits must match.

    The kernels take turns on the two GPUs; in the full suite each is compiled for both.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    statistics = {"absmax": "*u8"} if double else dict.fromkeys(("nested", "offset"), "constexpr")
    for name, block, numbers in COMPILED if FULL else COMPILED[int(double) :: 2]:
        kernel = getattr(nf4_gpu, name)
        constants = numbers | {"BLOCK": block} | ({} if double else {"nested": None, "offset": None})
        types = TYPES | (statistics if name != "_quantize" else {}) | dict.fromkeys(constants, "constexpr")
        names = kernel.arg_names
        source = ASTSource(
            kernel,
            {argument: types[argument] for argument in names},
            {(names.index(argument),): value for argument, value in constants.items() if argument in names},
        )
        options = {"enable_fp_fusion": False} if name == "_dequantize" else {}
        found = compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
        assert found["cubin"]
        assert "div.full" not in found["ptx"]
        assert ("div.rn.f32" in found["ptx"]) == (name == "_quantize")
        assert "cvt.rn.bf16" in found["ptx"] or name == "_quantize"
        assert "fma.rn.f32" not in found["ptx"] or name == "_matvec"
