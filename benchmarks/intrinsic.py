"""Time Walsh-Hadamard transforms against a copy, naive torch and a matrix product, and `intrinsic` against LoRA.

A step is forward, backward and AdamW on 4 rows x 256 tokens, as in `train_step.py`. Both adapters are on all linear
layers. The additional time of `intrinsic` does not depend on the batch: each matrix's map is generated three times per
step. Peak memory is the peak of torch's allocator in a step, beyond the model, the adapter and the optimizer states.
"""

from __future__ import annotations

import measure as m
import torch
from torch import Tensor
from train_step import step_of

import reparam
from reparam.kernels.fastfood import fastfood, fastfood_adjoint
from reparam.kernels.fwht import backend, fwht
from reparam.methods.intrinsic import Intrinsic


def naive(x: Tensor) -> Tensor:
    """The transform by repeated halving, as it is usually written in torch; x [1, N] -> [1, N]."""
    n, h = x.shape[-1], 1
    y = x.clone()
    while h < n:
        y = y.view(-1, n // (2 * h), 2, h)
        a, b = y[:, :, 0], y[:, :, 1]
        y = torch.stack([a + b, a - b], 2).view(-1, n)
        h *= 2
    return y


def transforms(quick: bool) -> list[m.Row]:
    """Rows for one long transform, many short ones and, if SciPy is installed, the product with a Hadamard matrix."""
    rounds = 3 if quick else 15
    n, small = (1 << 12, 1 << 8) if quick else (1 << 20, 1 << 11)
    x, out, short = torch.randn(n), torch.empty(n), torch.randn(n // 1024, 1024)
    rows = []
    long = m.interleave(
        {"ours": lambda: fwht(x), "copy": lambda: out.copy_(x), "naive": lambda: naive(x[None])}, rounds=rounds, calls=5
    )
    many = m.interleave({"ours": lambda: fwht(short), "copy": lambda: out.copy_(x)}, rounds=rounds, calls=5)
    rows += [
        m.Row(f"fwht of {n} numbers, over a copy of them", long.over("ours", "copy"), None, None, None),
        m.Row(f"fwht of {n} numbers, over naive torch", long.over("ours", "naive"), None, None, None),
        m.Row(f"{n // 1024} of 1024 numbers, over a copy of them", many.over("ours", "copy"), None, None, None),
    ]
    try:
        from scipy.linalg import hadamard
    except ImportError:
        return rows
    H, batch = torch.from_numpy(hadamard(small)).float(), torch.randn(16, small)
    matrix = m.interleave({"ours": lambda: fwht(batch), "matrix": lambda: batch @ H}, rounds=rounds, calls=5)
    what = f"16 of {small} numbers, over the product with scipy's matrix"
    return [*rows, m.Row(what, matrix.over("ours", "matrix"), None, None, None)]


def maps(quick: bool) -> list[m.Row]:
    """Rows for the Fastfood map and its adjoint, in nanoseconds per number of the large space D."""
    rows = 1 << 12 if quick else 1 << 20
    found = []
    for d in (100, 1000, 10_000):
        n = 1 << (d - 1).bit_length()
        x, g = torch.randn(d), torch.randn(rows)
        work = {
            "map": lambda x=x, n=n: fastfood(x, 1, n, rows),
            "adjoint": lambda g=g, n=n, d=d: fastfood_adjoint(g, 1, n, d),
        }
        times = m.interleave(work, rounds=3 if quick else 9)
        for name in work:
            found.append(m.Row(f"{name}, d = {d}: ns per number", times.median(name) / rows * 1e9, None, None, None))
    return found


def steps(quick: bool) -> list[m.Row]:
    """Rows for the time and the peak memory of a training step, over LoRA's."""
    base = m.llama(m.TINY if quick else m.LLAMA).train()
    models = {"lora": m.twin(base)}
    m.with_reparam(models["lora"])
    for d, space in ((1000, "weight"), (1000, "factor")):
        name = f"{space}, d = {d}"
        models[name] = m.twin(base)
        adapter = reparam.attach(models[name], Intrinsic(d=d, space=space), targets="all-linear")
        m.randomize(adapter.parameters())
    ids = torch.randint(0, base.config.vocab_size, (2, 16) if quick else (4, 256))
    work = {name: step_of(model, ids) for name, model in models.items()}
    times = m.interleave(work, rounds=2 if quick else 3)
    peaks = {name: m.peak_bytes(call) for name, call in work.items()}
    others = [name for name in models if name != "lora"]
    found = [m.Row(f"training step, {n}, over LoRA's", times.over(n, "lora"), None, None, None) for n in others]
    found += [m.Row(f"peak memory, {n}, over LoRA's", peaks[n] / peaks["lora"], None, None, None) for n in others]
    entries = sum(w.numel() for w in m.matrices(base))
    mib = peaks["lora"] / 2**20
    print(
        f"LoRA: {times.median('lora'):.2f} s per step, {mib:.0f} MiB; the adapted matrices have {entries:,} entries\n"
    )
    return found


def main() -> None:
    quick = m.setup(__doc__)
    print(f"compiled by: {backend()}\n")
    command = "python benchmarks/intrinsic.py"
    m.show("Intrinsic spaces", [*transforms(quick), *maps(quick), *steps(quick)], command)


if __name__ == "__main__":
    main()
