"""Measurements of the GPU benchmark; each returns rows of its table. `gpu.py` describes them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping

import bitsandbytes.functional as bnb
import gpu_models as models
import measure as m
import torch
from torch import Tensor, nn

import reparam
from reparam.kernels import nf4
from reparam.kernels.nf4_reference import dequantize_reference, quantize_reference
from reparam.kernels.nf4_tables import BLOCKS

LIMIT = 48_000_000_000  # bytes: a card of 48 GB
PAGED = 1 << 28  # bytes of optimizer states that the 65B run may hold on the device; the states have 1.6 GB in all
Line = tuple[str, str, str, str, str]  # measured, reparam, bitsandbytes, dense bfloat16, to reach


# ---- correctness


def check(device: torch.device, *, quick: bool) -> str:
    """Compare every kernel with its reference and return a summary; raises AssertionError if one differs."""
    shapes = [(3, 33), (64, 100)] if quick else [(3, 33), (77, 1000), (4096, 4096), (1024, 11008)]
    count = 0
    for shape in shapes:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for block in BLOCKS:
                for double in (False, True):
                    check_one(torch.randn(shape, device=device).to(dtype), reparam.NF4(block, double), quick=quick)
                    count += 1
    return f"{count} matrices: quantizing, dequantizing and products equal the references on {nf4.backend(device.type)}"


def check_one(w: Tensor, storage: reparam.NF4, *, quick: bool) -> None:
    """Check the quantized codes, the dequantized values and products with 1 to 16 rows of one matrix."""
    w[0, : storage.block] = 0
    codes, absmax = nf4.quantize(w, storage.block)
    expected = quantize_reference(w, storage.block)
    assert torch.equal(codes, expected[0]), (w.shape, w.dtype, storage)
    assert torch.equal(absmax, expected[1]), (w.shape, w.dtype, storage)
    weight = storage.quantize(w)
    settings = {"block": storage.block, "count": w.numel(), "dtype": w.dtype}
    found = nf4.dequantize(weight.codes, weight.statistics, **settings)
    assert torch.equal(found, dequantize_reference(weight.codes, weight.statistics, **settings)), (w.shape, storage)
    exact = weight.dense().double()
    for rows in (1, 3) if quick else (1, 2, 3, 5, 8, 16):
        x = torch.randn(rows, w.shape[1], device=w.device).to(w.dtype)
        wanted = x.double() @ exact.T
        # Products of many rows round the matrix to their dtype first: an error of eps / 2 for each term.
        bound = torch.finfo(w.dtype).eps * (x.double().abs() @ exact.abs().T) + 1e-6
        assert ((weight(x).double() - wanted).abs() <= bound).all(), (w.shape, w.dtype, storage, rows)


# ---- times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernel_seconds(call: m.Call, calls: int, device: torch.device) -> float:
    """Device seconds per call; on a CPU, CPU seconds of the process."""
    if device.type == "cpu":
        begin = time.process_time()
        for _ in range(calls):
            call()
        return (time.process_time() - begin) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(50_000_000)  # cycles, about 30 ms, during which the calls are queued
    first.record()
    for _ in range(calls):
        call()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000 / calls


def step_seconds(call: m.Call, calls: int, device: torch.device) -> float:
    """Wall-clock seconds per call, including kernel launches."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / calls


def take_turns(work: Mapping[str, m.Call], device: torch.device, *, rounds: int, steps: bool = False) -> m.Times:
    """Time all contestants in turns, in an order that rotates, after a warm-up round that does not count."""
    measure, calls = (step_seconds, 2) if steps else (kernel_seconds, 20)
    names = list(work)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(measure(work[name], calls, device))
    return m.Times({name: found[1:] for name, found in seconds.items()})


def bandwidth(device: torch.device, *, quick: bool) -> list[Line]:
    """Rows for quantizing and dequantizing, as shares of the bandwidth of a copy on the device."""
    n = 1 << (16 if quick else 28)
    w = torch.randn(n, device=device, dtype=torch.bfloat16)
    other = torch.empty_like(w)
    codes, absmax = nf4.quantize(w, 64)
    stats = nf4.compress_scales(absmax)
    their_codes, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    copy = {"copy": lambda: other.copy_(w)}
    quantizing = copy | {
        "ours": lambda: nf4.quantize(w, 64),
        "theirs": lambda: bnb.quantize_4bit(w, blocksize=64, quant_type="nf4"),
    }
    dequantizing = copy | {
        "ours": lambda: nf4.dequantize(codes, stats, block=64, count=n, dtype=w.dtype),
        "theirs": lambda: bnb.dequantize_4bit(their_codes, state),
    }
    moved = {
        "quantizes": w.nbytes + codes.nbytes + absmax.nbytes,
        "dequantizes, doubly quantized": w.nbytes + codes.nbytes,
    }
    lines = []
    for (what, size), work in zip(moved.items(), (quantizing, dequantizing), strict=True):
        times = take_turns(work, device, rounds=2 if quick else 10)
        share = {name: size / (2 * w.nbytes) * times.over("copy", name) for name in ("ours", "theirs")}
        cells = f"{share['ours']:.2f}", f"{share['theirs']:.2f}", "", ""
        lines.append((f"NF4 {what}: bandwidth over a device copy's", *cells))
    return lines


@torch.no_grad()
def decoding(device: torch.device, *, quick: bool) -> list[Line]:
    """Rows for the seven products of a transformer block with 1 and 8 rows; its weights exceed the cache."""
    shape = m.TINY if quick else models.BLOCKS_OF_7B
    hidden, inner = shape.hidden, shape.inner
    sizes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    matrices = [torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes]
    quantized = [reparam.NF4().quantize(w) for w in matrices]
    theirs = [models.bitsandbytes_nf4(nn.Linear(*w.shape[::-1], bias=False, device="meta"), w) for w in matrices]
    lines = []
    for rows in (1, 8):
        inputs = {size: torch.randn(rows, size, device=device, dtype=torch.bfloat16) for size in (hidden, inner)}
        xs = [inputs[w.shape[1]] for w in matrices]

        def all_of(maps: list, xs: list[Tensor] = xs) -> m.Call:
            return lambda: [f(x) for f, x in zip(maps, xs, strict=True)]

        linear = [lambda x, w=w: nn.functional.linear(x, w) for w in matrices]
        work = {"ours": all_of(quantized), "theirs": all_of(theirs), "dense": all_of(linear)}
        times = take_turns(work, device, rounds=2 if quick else 10)
        took = [f"{times.median(name) * 1e6:.0f} us" for name in work]
        ratio = f"{times.over('theirs', 'ours'):.2f} x bitsandbytes, {times.over('dense', 'ours'):.2f} x dense"
        lines.append((f"products of a 7B block, {rows} row{'s' * (rows > 1)}", f"{took[0]}: {ratio}", *took[1:], ""))
    return lines


def training(device: torch.device, *, quick: bool) -> list[Line]:
    """Rows for a step of some blocks of a 7B shape: reparam's QLoRA, PEFT on bitsandbytes, and dense LoRA."""
    shape = m.TINY if quick else models.BLOCKS_OF_7B
    ids = torch.randint(0, shape.vocabulary, (2, 16) if quick else (4, 512), device=device)
    work, memory = {}, {}
    for name, make in {"ours": models.nf4, "theirs": models.bitsandbytes_nf4, "dense": models.dense}.items():
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        model = models.build(shape, device, make)
        optimizer = models.theirs(model) if name == "theirs" else models.ours(model)
        work[name] = models.step_of(model, optimizer, ids, autocast=name == "theirs")
        work[name]()  # creates the optimizer states
        memory[name] = peak_of(work[name], device) - before
    times = take_turns(work, device, rounds=2 if quick else 8, steps=True)
    speed = [f"{ids.numel() / times.median(name):.0f} tokens/s" for name in work]
    gain = times.over("theirs", "ours")
    ours = f"{speed[0]}: {gain:.2f} x bitsandbytes, {times.over('dense', 'ours'):.2f} x dense"
    size = f"{ids.shape[0]} x {ids.shape[1]}"
    peaks = [f"{memory[name] / 1e9:.2f} GB" for name in work]
    return [
        (f"QLoRA step, {shape.layers} blocks of 7B, {size}", ours, *speed[1:], f"1.50 x{missed(gain < 1.5)}"),
        ("the same: peak memory", *peaks, f"below bitsandbytes'{missed(memory['ours'] > memory['theirs'])}"),
    ]


def largest(device: torch.device, *, quick: bool) -> list[Line]:
    """Rows for a step of a 65B shape within 48 GB of torch's allocator, which exclude the CUDA context."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        if total < LIMIT:
            return [("65B step in 48 GB", f"not run: the card has {total / 1e9:.0f} GB", "", "", "")]
        torch.cuda.set_per_process_memory_fraction(LIMIT / total, device)
    shape, tokens = (m.TINY, 16) if quick else (models.WHOLE_65B, 512)
    paging = {"budget": 1 << 15, "page": 1 << 14} if quick else {"budget": PAGED}
    model = models.build(shape, device, models.nf4)
    optimizer = models.ours(model, **paging)
    ids = torch.randint(0, shape.vocabulary, (1, tokens), device=device)
    step = models.step_of(model, optimizer, ids)
    step()
    peak = peak_of(step, device)
    seconds = statistics.median(step_seconds(step, 1, device) for _ in range(2 if quick else 5))
    count = sum(module.frozen.codes.numel() * 2 for module in model.modules() if hasattr(module, "updates"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = f"step of {count / 1e9:.1f} B quantized entries, {trained / 1e6:.0f} M trained, 1 x {tokens}"
    return [
        (f"{what}: peak memory", f"{peak / 1e9:.2f} GB", "", "", f"48 GB{missed(peak > LIMIT)}"),
        ("the same: time of a step", f"{seconds:.2f} s", "", "", ""),
        ("the same: states moved in a step", f"{moved(optimizer, step) / 1e9:.2f} GB", "", "", ""),
    ]


def peak_of(step: m.Call, device: torch.device) -> int:
    """Peak bytes of torch's allocator during a step; 0 on a CPU."""
    if device.type == "cpu":
        step()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def moved(optimizer: torch.optim.Optimizer, step: m.Call) -> int:
    """Bytes of optimizer states that a step moves to the device and from it."""
    before = optimizer.paging
    step()
    after = optimizer.paging
    return after.bytes_in + after.bytes_out - before.bytes_in - before.bytes_out


def missed(yes: bool) -> str:
    return " (missed)" if yes else ""
