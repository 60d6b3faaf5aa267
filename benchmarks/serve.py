"""Measure the serving engine against the engine without adapters, `generate` and PEFT.

Prompts have 8 to 512 tokens and answers 8 to 48, adapters are drawn from a power law, and with `arrivals` requests come
as a Poisson process, as in S-LoRA's test. Rates are new tokens per second of the process's own processor time. The
cases of a section take turns, each with the same requests, and a ratio is the median over the turns. `--seconds` is for
the turns of a section; making and reading the adapters comes before them.

    python benchmarks/serve.py [--only throughput static mixed peft loading thousand memory arrivals] [--seconds 20]
                               [--base FOLDER_OR_GGUF]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import reparam
from reparam.hf.gguf import folder_of
from reparam.serve import Engine, Limits, Request

BASE = Path(__file__).parents[1] / "assets" / "tiny-python"
RANK = 8


def base() -> Any:
    """The base of `--base`, in float32."""
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def make_adapters(root: Path, count: int, used: Collection[str] | None = None) -> list[str]:
    """LoRA on all linear maps, in folders a0, a1, ...; those that are not `used` have the bytes of a0."""
    model, names = base(), [f"a{i}" for i in range(count)]
    adapter = reparam.attach(model, reparam.LoRA(r=RANK), name="made")
    adapter.save(root / names[0], format="peft")  # without checksums, so that copies are made fast
    file = next((root / names[0]).glob("*.safetensors"))
    with safe_open(file, "pt") as held:
        tensors, about = {key: held.get_tensor(key) for key in held.keys()}, held.metadata()  # noqa: SIM118
    draw = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(max(t.numel() for t in tensors.values()), generator=draw)
    for number, name in enumerate(names):
        if number:
            shutil.copytree(root / names[0], root / name, copy_function=os.link)
        if used is not None and name not in used:
            continue
        (root / name / file.name).unlink()
        new = {key: t + noise.roll(7 * number)[: t.numel()].view(t.shape) for key, t in tensors.items()}
        save_file(new, root / name / file.name, about)
    return names


def requests_for(names: Sequence[str | None], count: int, *, longest: int = 64, seed: int = 0) -> list[Request]:
    """Prompts of 8 to `longest` tokens, log-uniform, answers of 8 to 48; adapter i has the share 1 / (i + 1)."""
    draw = torch.Generator().manual_seed(seed)
    shares = 1 / torch.arange(1, len(names) + 1)
    chosen = torch.multinomial(shares, count, replacement=True, generator=draw).tolist()
    sizes = (8 * (longest / 8) ** torch.rand(count, generator=draw)).long().tolist()
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


def turns(cases: dict[str, Callable[[int], float]], seconds: float) -> dict[str, list[float]]:
    """The rates of the cases, which take turns for so many seconds of processor time, and at least twice."""
    found: dict[str, list[float]] = {case: [] for case in cases}
    for run in cases.values():
        run(0)
    start, turn = time.process_time(), 0
    while turn < 2 or time.process_time() - start < seconds:
        turn += 1
        for case, run in cases.items():
            found[case].append(run(turn))
    return found


def show(what: str, found: dict[str, list[float]], first: str) -> None:
    for case, rates in found.items():
        ratios = [a / b for a, b in zip(rates, found[first], strict=True)]
        line = f"{what}: {case}: {statistics.median(rates):.0f} tokens/s"
        print(line if case == first else f"{line}, {statistics.median(ratios):.2f} of {first}", flush=True)


def throughput(root: Path, names: list[str], seconds: float) -> None:
    with Engine(base()) as plain, Engine(base(), adapters=root) as ready:
        ready.answer([Request([10], name, 1) for name in names])

        def answering(engine: Engine, own: Sequence[str | None]) -> Callable[[int], float]:
            return lambda turn: rate(engine, requests_for(own, 64, seed=turn))

        cases = {"no adapter": answering(plain, [None])}
        cases |= {f"{n} adapters": answering(ready, names[:n]) for n in (1, 8, 64)}
        cases["64 ready, all rows base"] = answering(ready, [None])
        show("64 requests", turns(cases, seconds), "no adapter")


def against_generate(
    model: Any, root: Path, names: list[str], rows: int, length: int, answers: tuple[int, int] = (32, 32), **more: Any
) -> dict[str, Any]:
    """The engine, and `generate` of `model` on one padded batch, for `rows` prompts of `length` tokens.

    Answers have from `answers[0]` to `answers[1]` tokens. A batch of `generate` goes on until the longest one has
    ended, and only the tokens that were asked for are counted.
    """
    engine = Engine(base(), adapters=root)
    engine.answer([Request([10], name, 1) for name in names])

    def asked(turn: int) -> tuple[torch.Tensor, list[int]]:
        draw = torch.Generator().manual_seed(turn)
        most = torch.randint(answers[0], answers[1] + 1, (rows,), generator=draw).tolist()
        return torch.randint(10, 4000, (rows, length), generator=draw), most

    def generate(turn: int) -> float:
        (ids, most), start = asked(turn), time.process_time()
        settings = {"do_sample": False, "pad_token_id": 1, "min_new_tokens": max(most), "max_new_tokens": max(most)}
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **more)
        return sum(most) / (time.process_time() - start)

    def serve(turn: int) -> float:
        ids, most = asked(turn)
        each = enumerate(zip(ids.tolist(), most, strict=True))
        return rate(engine, [Request(p, names[i % len(names)], count, stop_tokens=[]) for i, (p, count) in each])

    return {"generate": generate, "engine": serve, "close": engine.close}


def static(root: Path, names: list[str], seconds: float, answers: tuple[int, int] = (32, 32)) -> None:
    model = base()
    for name in names[:8]:
        reparam.load(model, root / name, name=name)
    reparam.select(model, [names[i % 8] for i in range(32)])
    cases = against_generate(model, root, names[:8], 32, 300, answers)
    close = cases.pop("close")
    which = " to ".join(map(str, sorted(set(answers))))
    show(f"32 prompts of 300 tokens, answers of {which}, 8 adapters, select([...])", turns(cases, seconds), "generate")
    close()


def mixed(root: Path, names: list[str], seconds: float) -> None:
    static(root, names, seconds, (8, 48))


def peft(root: Path, names: list[str], seconds: float) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, target_modules="all-linear")
    model: Any = get_peft_model(base(), config, adapter_name=names[0])
    for name in names[1:16]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.01)
    model.eval()
    cases = against_generate(model, root, names[:16], 16, 32, adapter_names=names[:16])
    close = cases.pop("close")
    show("16 rows, 16 adapters, PEFT's adapter_names", turns(cases, seconds), "generate")
    close()


def waited() -> float:
    """Seconds that the current thread has waited for a processor, because of other processes; 0 if unknown."""
    file = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    return int(file.read_text().split()[1]) / 1e9 if file.exists() else 0.0


def loading(root: Path, names: list[str], seconds: float) -> None:
    """The longest step while adapters load, over without: wall time, less that of waiting for a processor."""
    with Engine(base(), adapters=root, limits=Limits(requests=16)) as engine:
        engine.answer([Request([10], name, 1) for name in names[:8]])
        manager, times = engine._loop._manager, list[float]()
        body = manager._generation_loop_body

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, queue, number = time.perf_counter(), waited(), manager.current_batch
            go_on = body(*args, **kwargs)
            if manager.current_batch != number:
                times.append(time.perf_counter() - start - (waited() - queue))
            return go_on

        manager._generation_loop_body = timed
        found: dict[str, list[float]] = {"without": [], "while loading": []}
        longest: dict[str, list[float]] = {"without": [], "while loading": []}
        left, start = list(names[8:]), time.process_time()
        while left and (len(longest["without"]) < 2 or time.process_time() - start < seconds):
            for case in found:
                times.clear()
                asked = [Request([10 + i], names[i % 8], 100, stop_tokens=[]) for i in range(16)]
                work = threading.Thread(target=engine.answer, args=(asked,))
                work.start()
                while case == "while loading" and work.is_alive() and left:
                    name = left.pop(0)
                    engine.load(name, root / name)
                work.join()
                steps = sorted(times[3:])
                found[case].append(statistics.median(steps))
                longest[case].append(steps[-1])
        for what, each in (("median", found), ("longest", longest)):
            a, b = (statistics.median(each[case]) for case in ("while loading", "without"))
            print(f"16 decode, {what} step: {1000 * a:.0f} ms while loading, {1000 * b:.0f} ms without, {a / b:.2f}")


def drawn(names: Sequence[str]) -> list[str]:
    """The adapters of the 128 requests of `thousand`."""
    return [request.adapter or "" for request in requests_for(names, 128)]


def thousand(root: Path, names: list[str], seconds: float) -> None:
    """1,000 registered adapters over room for 64, the others in host memory, against 5 adapters."""
    own = sum(file.stat().st_size for file in (root / names[0]).glob("*.safetensors"))
    limits = Limits(adapter_bytes=64 * own, host_bytes=1000 * own)
    with Engine(base(), adapters=root, limits=limits) as many, Engine(base(), adapters=root) as few:

        def asked(own: list[str], turn: int) -> list[Request]:
            """Other prompts in each turn, for the same adapters, so that all have been read before the turns."""
            new = requests_for(own, 128, seed=turn)
            return [dataclasses.replace(r, adapter=name) for r, name in zip(new, drawn(own), strict=True)]

        for name in dict.fromkeys(drawn(names)):  # one by one: a load beside steps takes rests
            many.answer([Request([10], name, 1)])
        few.answer([Request([10], name, 1) for name in names[:5]])
        loads = many.metrics().adapter_loads
        cases = {
            "5": lambda turn: rate(few, asked(names[:5], turn)),
            "1,000": lambda turn: rate(many, asked(names, turn)),
        }
        found = turns(cases, seconds)
        show("128 requests, adapters registered", found, "5")
        each = (many.metrics().adapter_loads - loads) / (len(found["5"]) + 1)
        print(f"1,000 registered, 64 slots: {each:.0f} adapters came back from host memory in each turn")


def memory(root: Path, names: list[str], seconds: float) -> None:
    with Engine(base(), adapters=root) as engine:
        engine.answer([Request([10], name, 1) for name in names[:64]])
        own = sum(file.stat().st_size for name in names[:64] for file in (root / name).glob("*.safetensors"))
        print(f"64 adapters: tables take {engine._banks.nbytes() / own:.2f} of the adapters' own bytes")


def arrivals(root: Path, names: list[str], seconds: float) -> None:
    """Requests that come as a Poisson process, at 70 % of what the machine answers when all come at once."""
    with Engine(base(), adapters=root) as engine:
        engine.answer([Request([10], name, 1) for name in names[:64]])
        for case, own in (("no adapter", [None]), ("64 adapters", names[:64])):
            asked, start = requests_for(own, 64, longest=512, seed=1), time.perf_counter()
            engine.answer(asked)
            pause = (time.perf_counter() - start) / 64 / 0.7
            first, whole = asyncio.run(arrive(engine, requests_for(own, 64, longest=512, seed=2), pause))
            told = [
                f"{what} {1000 * statistics.quantiles(each, n=20)[place]:.0f}"
                for each, name in ((first, "first token"), (whole, "answer"))
                for what, place in ((f"{name}, ms: median", 9), ("95 %", 18))
            ]
            print(f"Poisson arrivals, {case}: {', '.join(told)}", flush=True)


async def arrive(engine: Engine, requests: list[Request], pause: float) -> tuple[list[float], list[float]]:
    """The times to the first token and to the end, of requests that come every `pause` seconds in the mean."""
    gaps = torch.empty(len(requests)).exponential_(1 / pause, generator=torch.Generator().manual_seed(0)).tolist()

    async def one(request: Request) -> tuple[float, float]:
        start, first = time.perf_counter(), 0.0
        async for _ in await engine.open(request):
            first = first or time.perf_counter() - start
        return first, time.perf_counter() - start

    tasks = []
    for request, gap in zip(requests, gaps, strict=True):
        tasks.append(asyncio.create_task(one(request)))
        await asyncio.sleep(gap)
    found = await asyncio.gather(*tasks)
    return [first for first, _ in found], [whole for _, whole in found]


SECTIONS = {
    "throughput": (throughput, 64),
    "static": (static, 8),
    "mixed": (mixed, 8),
    "peft": (peft, 16),
    "loading": (loading, 40),
    "thousand": (thousand, 1000),
    "memory": (memory, 64),
    "arrivals": (arrivals, 64),
}


def main() -> None:
    global BASE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=20, help="processor time of each section, about")
    parser.add_argument("--base", default=str(BASE), help="the folder of a base, or a GGUF file (default: tiny-python)")
    given = parser.parse_args()
    BASE = Path(folder_of(given.base, dtype="float32"))
    torch.set_num_threads(1)
    print(json.dumps({"torch": torch.__version__, "threads": 1, "base": BASE.name, "rank": RANK}))
    with tempfile.TemporaryDirectory() as folder:
        counts = [SECTIONS[name][1] for name in given.only]
        every = [f"a{i}" for i in range(max(counts))]
        names = make_adapters(Path(folder), len(every), {*every[:64], *(drawn(every) if len(every) > 64 else ())})
        for name in given.only:
            SECTIONS[name][0](Path(folder), names[: SECTIONS[name][1]], given.seconds)


if __name__ == "__main__":
    main()
