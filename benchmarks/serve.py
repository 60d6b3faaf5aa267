"""Time the serving engine on the embedded model: tokens per second of processor time, and the longest step.

Requests come at once, with adapters drawn from a power law and prompts and answers of mixed lengths, as in S-LoRA's
test. Rows are ratios to the engine without adapters, or to `generate`, in the same run and with the same requests.

    python benchmarks/serve.py [--requests 64] [--rounds 2]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import reparam
from reparam.serve import Engine, Limits, Request

BASE = Path(__file__).parents[1] / "assets" / "tiny-python"


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def make_adapters(root: Path, count: int) -> list[str]:
    model = base()
    names = [f"a{i}" for i in range(count)]
    for seed, name in enumerate(names):
        adapter = reparam.attach(model, reparam.LoRA(r=8), name="made")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        adapter.save(root / name)
        reparam.remove(model, "made")
    return names


def requests_for(names: list[str | None], count: int, *, longest: int = 64, seed: int = 0) -> list[Request]:
    """Prompts of 8 to `longest` tokens, answers of 8 to 48; adapter i has the share 1 / (i + 1)."""
    draw = torch.Generator().manual_seed(seed)
    shares = 1 / torch.arange(1, len(names) + 1)
    chosen = torch.multinomial(shares, count, replacement=True, generator=draw).tolist()
    sizes = torch.randint(8, longest + 1, (count,), generator=draw).tolist()
    answers = torch.randint(8, 49, (count,), generator=draw).tolist()
    prompts = [torch.randint(10, 4000, (size,), generator=draw).tolist() for size in sizes]
    return [
        Request(prompt, names[i], most, stop_tokens=[])
        for prompt, i, most in zip(prompts, chosen, answers, strict=True)
    ]


def rate(engine: Engine, requests: list[Request]) -> float:
    """New tokens per second of the process's own processor time."""
    start = time.process_time()
    tokens = sum(len(answer.ids) for answer in engine.answer(requests))
    return tokens / (time.process_time() - start)


def throughput(root: Path, names: list[str], count: int, rounds: int) -> None:
    cases: dict[str, tuple[Path | None, list[str | None]]] = {"no adapter": (None, [None])}
    cases |= {f"{n} adapters": (root, list(names[:n])) for n in (1, 8, 64)}
    cases["64 ready, all rows base"] = root, [None]
    found: dict[str, list[float]] = {case: [] for case in cases}
    engines = {case: Engine(base(), adapters=folder, limits=Limits()) for case, (folder, _) in cases.items()}
    try:
        for case, engine in engines.items():
            if case != "no adapter":
                engine.answer([Request([10], name, 1) for name in (names if "64" in case else cases[case][1])])
            rate(engine, requests_for(cases[case][1], count))
        for _ in range(rounds):
            for case, engine in engines.items():
                found[case].append(rate(engine, requests_for(cases[case][1], count)))
    finally:
        for engine in engines.values():
            engine.close()
    first = max(found["no adapter"])
    for case, rates in found.items():
        print(f"{count} requests, {case}: {max(rates):.0f} tokens/s ({max(rates) / first:.2f} of no adapter)")


def against_static(root: Path, names: list[str], rounds: int) -> None:
    """32 prompts of 300 tokens, 8 adapters: the engine, and `generate` on one padded mixed batch."""
    requests = requests_for(list(names[:8]), 32, seed=1)
    draw = torch.Generator().manual_seed(2)
    prompts = torch.randint(10, 4000, (32, 300), generator=draw)
    requests = [
        Request(prompt.tolist(), request.adapter, 32, stop_tokens=[])
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    model = base()
    for name in names[:8]:
        reparam.load(model, root / name, name=name)
    reparam.select(model, [request.adapter for request in requests])
    best = {"static": 0.0, "engine": 0.0}
    with Engine(base(), adapters=root) as e:
        for number in range(rounds + 1):
            start = time.process_time()
            with torch.no_grad():
                model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=32,
                    min_new_tokens=32,
                    do_sample=False,
                    pad_token_id=1,
                )
            static = 32 * 32 / (time.process_time() - start)
            fresh = [Request([11 + number, *r.prompt[1:]], r.adapter, 32, stop_tokens=[]) for r in requests]
            if number:  # the first round compiles
                best = {"static": max(best["static"], static), "engine": max(best["engine"], rate(e, fresh))}
            else:
                rate(e, fresh)
    ratio = best["engine"] / best["static"]
    print(f"32 prompts of 300 tokens: {best['engine']:.0f} tokens/s, generate {best['static']:.0f} ({ratio:.2f})")


def loading(root: Path, names: list[str]) -> None:
    """The longest step while adapters load, and without, 16 requests decoding."""
    with Engine(base(), adapters=root, limits=Limits(requests=16)) as engine:
        engine.answer([Request([10], name, 1) for name in names[:8]])
        for case in ("without", "while loading", "without again"):
            times: list[float] = []
            hook = engine.model.register_forward_hook(lambda *_, to=times: to.append(time.perf_counter()))
            work = threading.Thread(
                target=engine.answer,
                args=([Request([10 + i], names[i % 8], 100, stop_tokens=[]) for i in range(16)],),
            )
            work.start()
            if case == "while loading":
                for name in names[8:20]:
                    engine.load(name, root / name)
            work.join()
            hook.remove()
            steps = sorted(b - a for a, b in itertools.pairwise(times[3:]))
            longest, median = 1000 * steps[-1], 1000 * steps[len(steps) // 2]
            print(f"16 decode, {case}: longest step {longest:.0f} ms, median {median:.0f}")


def memory(root: Path, names: list[str]) -> None:
    with Engine(base(), adapters=root) as engine:
        engine.answer([Request([10], name, 1) for name in names])
        own = sum(file.stat().st_size for name in names for file in (root / name).glob("*.safetensors"))
        print(f"{len(names)} adapters: tables take {engine._banks.nbytes() / own:.2f} of the adapters' own bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=("throughput", "static", "loading", "memory"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        names = make_adapters(Path(folder), {"static": 8, "loading": 20}.get(given.only, 64))
        if given.only in (None, "throughput"):
            throughput(Path(folder), names, given.requests, given.rounds)
        if given.only in (None, "static"):
            against_static(Path(folder), names, given.rounds)
        if given.only in (None, "loading"):
            loading(Path(folder), names)
        if given.only in (None, "memory"):
            memory(Path(folder), names)


if __name__ == "__main__":
    main()
