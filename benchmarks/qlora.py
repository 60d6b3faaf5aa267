"""Time NF4 on a CPU: kernels against bitsandbytes and memcpy; QLoRA steps and one-token passes against dense models.

Kernels: one matrix of 4096 x 4096. bitsandbytes cannot write into an existing buffer, so its times include allocating
new memory in every call, with page faults; reparam writes into one buffer. The limit is the time to copy the output.

Steps: Llama shape, float32, r = 16 on all linear layers; forward, backward and AdamW. The bitsandbytes column has
PEFT's LoRA on `Linear4bit`, over PEFT's LoRA on the same dense model. Memory is the peak of resident memory of a new
process during two steps, after the model was made, over that for the dense model.
"""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import bitsandbytes as bnb
import measure as m
import peft
import torch
from torch import Tensor, nn
from train_step import step_of

import reparam
from reparam.kernels.nf4 import backend, quantize
from reparam.kernels.nf4_tables import Statistics


def kernels(*, quick: bool) -> list[m.Row]:
    """Table rows for quantizing from float32 and dequantizing to bfloat16, with and without double quantization."""
    side = 256 if quick else 4096
    w = torch.randn(side, side)
    half = w.bfloat16()
    ours = reparam.NF4().quantize(half)
    plain, double = Statistics(quantize(half, 64)[1]), ours.statistics
    buffer, copy, copy_half = torch.empty_like(half), torch.empty_like(w), torch.empty_like(half)
    theirs, nested = (
        bnb.functional.quantize_4bit(half, quant_type="nf4", blocksize=64, compress_statistics=double)
        for double in (False, True)
    )
    dequantize = {"block": 64, "count": w.numel(), "dtype": torch.bfloat16, "out": buffer}
    work = {
        "copy": lambda: copy.copy_(w),
        "copy half": lambda: copy_half.copy_(half),
        "quantize": lambda: quantize(w, 64),
        "quantize double": lambda: reparam.NF4().quantize(w),
        "quantize bnb": lambda: bnb.functional.quantize_4bit(w, quant_type="nf4", blocksize=64),
        "quantize double bnb": lambda: bnb.functional.quantize_4bit(
            w, quant_type="nf4", blocksize=64, compress_statistics=True
        ),
        "dequantize": lambda: dequantize(ours.codes, plain, **dequantize),
        "dequantize double": lambda: dequantize(ours.codes, double, **dequantize),
        "dequantize bnb": lambda: bnb.functional.dequantize_4bit(*theirs),
        "dequantize double bnb": lambda: bnb.functional.dequantize_4bit(*nested),
    }
    times = m.interleave(work, rounds=3 if quick else 15)
    size, over = f"{side} x {side}", times.over
    fresh, fresh_double = over("copy half", "dequantize bnb"), over("copy half", "dequantize double bnb")
    return [
        _row(times, f"quantize {size} float32, over a copy of it", "quantize", "copy", limit=1.0, goal=2.0),
        _row(times, "the same with checks and double quantization", "quantize double", "copy", limit=1.0),
        m.Row("dequantize to bfloat16, over bitsandbytes", over("dequantize", "dequantize bnb"), 1.0, fresh, 0.4),
        m.Row("the same, doubly quantized", over("dequantize double", "dequantize double bnb"), 1.0, fresh_double, 0.4),
        _row(times, "the same, over a copy of the result", "dequantize double", "copy half", limit=1.0),
    ]


def token_through_a_layer(*, quick: bool) -> m.Row:
    """Table row for one token through one wide layer, without gradients."""
    outputs, inputs = (256, 128) if quick else (11008, 4096)
    dense = nn.Linear(inputs, outputs, bias=False)
    ours = nn.Sequential(nn.Linear(inputs, outputs, bias=False))
    reparam.quantize(ours, "nf4", targets="0")
    x = torch.randn(1, inputs)
    with torch.no_grad():
        times = m.interleave({"dense": lambda: dense(x), "ours": lambda: ours(x)}, rounds=5 if quick else 25)
    what = f"one token through {outputs} x {inputs}, over dense float32"
    return m.Row(what, times.over("ours", "dense"), None, None, None)


def _row(times: m.Times, what: str, name: str, other: str, *, limit: float, goal: float | None = None) -> m.Row:
    """Table row for a kernel of reparam and of bitsandbytes, both over the time of `other`."""
    return m.Row(what, times.over(name, other), times.over(f"{name} bnb", other), limit, goal)


def with_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace every linear layer of the blocks by bitsandbytes' `Linear4bit`, with double quantization."""
    for name, module in list(model.named_modules()):
        if name.endswith(m.LINEARS):
            model.set_submodule(name, _linear4bit(module, torch.float32))
    return model


def _linear4bit(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        module.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return layer.to("cpu")


# The rows consist of whole blocks, because bitsandbytes fails in eval mode on a CPU if a block spans two rows.
SHAPE = m.Shape(hidden=512, inner=1408, layers=8, heads=8)
QUICK = m.Shape(hidden=64, inner=128, layers=2, heads=2, vocabulary=100)
CONTESTANTS = ("dense", "nf4", "dense peft", "nf4 peft")


def contestant(name: str, shape: m.Shape) -> nn.Module:
    """A model with a LoRA of r = 16 by reparam or PEFT on a dense or quantized base, by its name in CONTESTANTS."""
    torch.manual_seed(0)
    model = m.llama(shape).train()
    if name.endswith("peft"):
        return m.with_peft(with_bitsandbytes(model) if name.startswith("nf4") else model)
    if name == "nf4":
        reparam.quantize(model, "nf4")
    return m.with_reparam(model)


def resident(name: str, shape: m.Shape, ids: Tensor) -> float:
    """Peak resident bytes of a new process during two steps, minus its resident bytes before it made the model."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident, (name, shape, ids))


def _resident(name: str, shape: m.Shape, ids: Tensor) -> float:
    torch.set_num_threads(1)
    small = step_of(contestant(name, QUICK), ids[:1, :8] % QUICK.vocabulary)  # imports and compiles everything
    small()
    before = _status("VmRSS")
    step = step_of(contestant(name, shape), ids)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, because making the model took more
    step()
    step()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * float(found[1])


def kept_over_input(*, peft_layer: bool) -> float:
    """Bytes that a quantized 1024 x 1024 layer with LoRA keeps for backward, over the bytes of its bfloat16 input."""
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False)).bfloat16()
    if peft_layer:
        model[0] = _linear4bit(model[0], torch.bfloat16)
        model = peft.get_peft_model(model, peft.LoraConfig(r=m.RANK, target_modules=["0"]))
    else:
        reparam.quantize(model, "nf4", targets="0")
        reparam.attach(model, reparam.LoRA(r=m.RANK), targets="0")
    x = torch.randn(2048, 1024, dtype=torch.bfloat16, requires_grad=True)
    return m.kept_bytes(model.train(), lambda model: model(x)) / x.nbytes


def steps(*, quick: bool) -> list[m.Row]:
    """Table rows for a training step, its memory, a forward pass of one token, and bytes."""
    shape = QUICK if quick else SHAPE
    ids = torch.randint(0, shape.vocabulary, (2, 16) if quick else (4, 256))
    models = {name: contestant(name, shape) for name in CONTESTANTS}
    times = m.interleave({name: step_of(models[name], ids) for name in CONTESTANTS}, rounds=2 if quick else 8)
    held = {name: resident(name, shape, ids) for name in CONTESTANTS}
    for model in models.values():
        model.eval()
    tokens = m.interleave({name: m.forward(models[name], 1, 1) for name in CONTESTANTS}, rounds=5 if quick else 40)
    entries = sum(w.numel() for w in m.matrices(m.llama(shape)))
    quantized = [p for name, p in models["nf4"].named_parameters() if p.dtype in (torch.uint8, torch.int32)]
    per_entry = sum(p.nbytes for p in quantized) / entries
    theirs = sum(
        w.nbytes + sum(t.nbytes for t in w.quant_state.as_dict(quantized=False).values() if isinstance(t, Tensor))
        for w in models["nf4 peft"].parameters()
        if isinstance(w, bnb.nn.Params4bit)
    )
    size = f"{ids.shape[0]} x {ids.shape[1]}"
    step = times.over("nf4", "dense"), times.over("nf4 peft", "dense peft")
    memory = held["nf4"] / held["dense"], held["nf4 peft"] / held["dense peft"]
    token = tokens.over("nf4", "dense"), tokens.over("nf4 peft", "dense peft")
    kept = kept_over_input(peft_layer=False), kept_over_input(peft_layer=True)
    return [
        m.Row(f"QLoRA step {size}, r = 16, over the dense LoRA step", *step, 1.0, 1.05),
        m.Row("memory of the step, over the dense step's", *memory, None, 1.0),
        m.Row("forward of one token, over the dense one", *token, None, None),
        m.Row("bytes kept for backward by a bfloat16 layer, over its input", *kept, 1.0, None),
        m.Row("bytes per quantized entry", per_entry, theirs / entries, 4.126953125 / 8, 0.5159),
    ]


def main() -> None:
    quick = m.setup(__doc__)
    print(f"kernels: {backend()}\n")
    rival = f"bitsandbytes {bnb.__version__} (steps: with PEFT {peft.__version__})"
    rows = [*kernels(quick=quick), token_through_a_layer(quick=quick), *steps(quick=quick)]
    m.show("NF4 on a CPU", rows, "python benchmarks/qlora.py", rival=rival)


if __name__ == "__main__":
    main()
