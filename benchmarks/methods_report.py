"""Make tables and plots from the finished runs of `methods.py` and the figures of `methods_cost.py`.

Writes methods.json, images/methods-scores.png and images/methods-directions.png, and replaces everything after
"## Tables" in evidence/methods.md by the tables. Intervals are Student's 95 % over seeds; differences to LoRA are
paired by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import methods as m
import runs
from matplotlib.figure import Figure

from reparam.inspect.geometry import Directions, correlation

UNITS = {"loss": "nats per answer token", "bits": "bits per byte"}
LABELS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "lora_plus": "LoRA+",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "qlora": "QLoRA",
    "qlora_plus": "QLoRA+",
    "qdora": "QDoRA",
    "qadalora": "QAdaLoRA",
}
MOVED = ("full", "lora", "dora")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TABLES = "## Tables\n"
Runs = dict[tuple[str, str], dict[int, dict[str, Any]]]  # task and method -> seed -> figures


def read(folder: Path) -> tuple[Runs, list[dict[str, Any]]]:
    """Read the figures of all scored runs and of all tuning runs."""
    scored: Runs = {}
    tuning = []
    for file in sorted((folder / "runs").glob("*.json")):
        run = json.loads(file.read_text())
        if run["seed"] == m.TUNING:
            tuning.append(run)
        else:
            scored.setdefault((run["task"], run["method"]), {})[run["seed"]] = run
    return scored, tuning


def interval(values: list[float]) -> dict[str, Any]:
    """Mean, half the length of the 95 % interval (None for a single value), and number of seeds."""
    mean, half = runs.interval(values)
    return {"mean": mean, "half": None if math.isnan(half) else half, "seeds": len(values)}


def summary(scored: Runs) -> dict[str, Any]:
    """For each task and method: scores, differences to LoRA and, on NF4, differences to the method's dense version."""
    found: dict[str, Any] = {}
    for (task, method), by_seed in scored.items():
        entry: dict[str, Any] = {
            "rate": next(iter(by_seed.values()))["rate"],
            "parameters": sorted({run["parameters"] for run in by_seed.values()}),
            "by seed": {seed: run["test"] for seed, run in sorted(by_seed.items())},
        }
        for key in next(iter(by_seed.values()))["test"]:
            entry[key] = interval([run["test"][key] for run in by_seed.values()])
            for name, other in (("to lora", "lora"), ("to dense", method.removeprefix("q"))):
                beside = scored.get((task, other), {})
                common = [seed for seed in by_seed if seed in beside]
                if other != method and common:
                    entry[f"{key} {name}"] = interval(
                        [by_seed[seed]["test"][key] - beside[seed]["test"][key] for seed in common]
                    )
        found.setdefault(task, {})[method] = entry
    return found


def majority(folder: Path) -> dict[str, float]:
    """Share of scored rows, by task, whose answer is the most frequent answer in `train`."""
    found = {}
    for task in m.CHATS:
        place = m.ROOT / "assets/tasks" if (m.ROOT / "assets/tasks" / task).exists() else folder / "tasks"
        train, test = (
            [json.loads(line)["messages"][-1]["content"] for line in (place / task / f"{side}.jsonl").open()]
            for side in ("train", "test")
        )
        test = test[: m.Sizes().held_out]
        found[task] = test.count(Counter(train).most_common(1)[0][0]) / len(test)
    return found


def points(run: dict[str, Any], kinds: tuple[str, ...]) -> list[tuple[int, str, Directions]]:
    """Checkpoint (0 halfway, 1 at the end), path, and ΔM and ΔD of each site of these kinds."""
    return [
        (checkpoint, path, Directions(*values))
        for checkpoint, sites in enumerate(run["moved"])
        for path, *values in sites
        if path.endswith(kinds)
    ]


def directions(scored: Runs) -> dict[str, Any]:
    """Correlations of ΔM and ΔD by task and method, for query and value matrices and for all, as means over seeds."""
    found: dict[str, Any] = {}
    for (task, method), by_seed in scored.items():
        if method not in MOVED:
            continue
        entry: dict[str, Any] = {}
        for name, kinds in (("query and value", ("q_proj", "v_proj")), ("all", KINDS)):
            entry[name] = interval([correlation([d for *_, d in points(run, kinds)]) for run in by_seed.values()])
        last = [d for run in by_seed.values() for checkpoint, _, d in points(run, KINDS) if checkpoint == 1]
        entry["magnitude"] = statistics.mean(d.magnitude for d in last)
        entry["direction"] = statistics.mean(d.direction for d in last)
        found.setdefault(task, {})[method] = entry
    return found


def shown(entry: dict[str, Any] | None, *, sign: str = "", digits: int = 3) -> str:
    """Format a mean and half the length of its interval for a table."""
    if entry is None:
        return ""
    half = "" if entry["half"] is None else f" ± {entry['half']:.{digits}f}"
    return f"{entry['mean']:{sign}.{digits}f}{half}"


def tables(
    found: dict[str, Any], moved: dict[str, Any], baseline: dict[str, float], tuning: list[Any], cost: dict[str, Any]
) -> str:
    """All tables as Markdown."""
    lines: list[str] = []
    for task in [task for task in m.TASKS if task in found]:
        methods = found[task]
        metrics = [key for key in ("loss", "exact", "bits") if key in methods["lora"]]
        names = {"loss": UNITS["loss"], "bits": UNITS["bits"], "exact": "exact match"}
        heads = [head for key in metrics for head in (names[key], "difference to LoRA")]
        rule = f", always giving the most frequent answer: {baseline[task]:.3f}" if task in baseline else ""
        lines += [f"\n**{task}**{rule}", ""]
        lines += ["| method | rate | parameters | seeds | " + " | ".join(heads) + " |", "|---" * (4 + len(heads)) + "|"]
        for method in [method for method in m.METHODS if method in methods]:
            entry = methods[method]
            cells = [c for k in metrics for c in (shown(entry[k]), shown(entry.get(f"{k} to lora"), sign="+"))]
            counts = " to ".join(f"{n:,}" for n in sorted({entry["parameters"][0], entry["parameters"][-1]}))
            head = f"| {LABELS[method]} | {entry['rate']:g} | {counts} | {entry[metrics[0]]['seeds']} | "
            lines.append(head + " | ".join(cells) + " |")
    quantized = [
        method for method in m.METHODS if any(method in found.get(task, {}) for task in m.TASKS) and method[0] == "q"
    ]
    if quantized:
        lines += [
            "\n| NF4 minus dense, paired by seed | " + " | ".join(m.TASKS) + " |",
            "|---" * (1 + len(m.TASKS)) + "|",
        ]
    for method in quantized:
        entries = [found.get(task, {}).get(method, {}) for task in m.TASKS]
        cells = [shown(entry.get("loss to dense") or entry.get("bits to dense"), sign="+") for entry in entries]
        lines.append(f"| {LABELS[method]} | " + " | ".join(cells) + " |")
    if cost:
        lines += ["\n| step of 8 x 128 | over LoRA's | CPU ms | MiB held | additional peak MiB |", "|---" * 5 + "|"]
    for kind, row in cost.items():
        mib = " | ".join(f"{row[key] / 2**20:.1f}" for key in ("held bytes", "peak bytes of a step"))
        lines.append(f"| {kind} | {row['over lora']:.2f} | {1000 * row['seconds']:.0f} | {mib} |")
    rates = sorted({run["rate"] for run in tuning})
    lines += [
        "\n| tuning, on `valid` | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---" * (1 + len(rates)) + "|",
    ]
    losses = {(run["task"], run["method"], run["rate"]): m.held_out_loss(run) for run in tuning}
    for task, method in dict.fromkeys((task, method) for task in m.TASKS for method in m.METHODS):
        row = [losses.get((task, method, rate)) for rate in rates]
        if any(value is not None for value in row):
            cells = ["" if value is None else f"{value:.3f}" for value in row]
            lines.append(f"| {task}, {LABELS[method]} | " + " | ".join(cells) + " |")
    heads = ["r, query and value", "r, all sites", "mean ΔM", "mean ΔD"]
    lines += ["\n| task, method | " + " | ".join(heads) + " |", "|---" * 5 + "|"]
    for task, method in [(t, k) for t in m.TASKS for k in MOVED if k in moved.get(t, {})]:
        e = moved[task][method]
        r = [shown(e[name], sign="+", digits=2) for name in ("query and value", "all")]
        lines.append(f"| {task}, {LABELS[method]} | {r[0]} | {r[1]} | {e['magnitude']:.2g} | {e['direction']:.2g} |")
    return "\n".join(lines)


def draw_scores(found: dict[str, Any], file: Path) -> None:
    """Plot each method's held-out loss with its interval, one panel for each task; a band shows LoRA's interval."""
    figure = Figure(figsize=(12, 4), layout="constrained", dpi=120)
    tasks = [task for task in m.TASKS if task in found]
    methods = [method for method in m.METHODS if any(method in found[task] for task in tasks)]
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
        key = "bits" if task in m.TEXTS else "loss"
        lora = found[task]["lora"][key]
        if lora["half"] is not None:
            axes.axvspan(lora["mean"] - lora["half"], lora["mean"] + lora["half"], color="0.9", zorder=0)
        for row, method in enumerate(methods):
            entry = found[task].get(method)
            if entry is not None:
                color = "tab:orange" if method.startswith("q") else "tab:gray" if method == "full" else "tab:blue"
                axes.errorbar(entry[key]["mean"], row, xerr=entry[key]["half"], fmt="o", color=color, capsize=3)
        axes.set(title=task, xlabel=f"{UNITS[key]} on test (lower is better)")
        axes.set_yticks(range(len(methods)), [LABELS[method] for method in methods])
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def draw_directions(scored: Runs, file: Path) -> None:
    """Plot ΔM against ΔD of every site, halfway and at the end, for the first seed; rows are tasks, columns methods."""
    figure = Figure(figsize=(11, 9), layout="constrained", dpi=110)
    tasks = [task for task in m.TASKS if all(scored.get((task, method)) for method in MOVED)]
    grid = figure.subplots(len(tasks), len(MOVED), squeeze=False)
    for (i, task), (j, method) in [(a, b) for a in enumerate(tasks) for b in enumerate(MOVED)]:
        axes, by_seed = grid[i][j], scored[task, method]
        found = points(by_seed[min(by_seed)], KINDS)
        for number, kind in enumerate(KINDS):
            for checkpoint, marker, size in ((0, "o", 14), (1, "^", 26)):
                own = [d for at, path, d in found if at == checkpoint and path.endswith(kind)]
                x, y = [d.direction for d in own], [d.magnitude for d in own]
                label = kind.removesuffix("_proj") if checkpoint and i == j == 0 else None
                axes.scatter(x, y, s=size, marker=marker, color=f"C{number}", alpha=0.8, linewidths=0, label=label)
        axes.set_title(
            f"{task}, {LABELS[method]}: r = {correlation([d for *_, d in found]):+.2f}", fontsize=10, loc="right"
        )
        axes.ticklabel_format(style="sci", scilimits=(-2, 3))
        axes.set(xlabel="ΔD", ylabel="ΔM")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(KINDS), frameon=False)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("out/methods"), help="output folder of methods.py")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    given = parser.parse_args()
    scored, tuning = read(given.runs)
    found, moved, baseline = summary(scored), directions(scored), majority(given.runs)
    file = given.runs / "cost.json"
    cost = json.loads(file.read_text()) if file.exists() else {}
    everything = {
        "scores": found,
        "directions": moved,
        "most frequent answer": baseline,
        "tuning": [{k: run[k] for k in ("task", "method", "rate", "valid")} for run in tuning],
        "cost": cost,
    }
    (given.output / "images").mkdir(parents=True, exist_ok=True)
    (given.output / "methods.json").write_text(json.dumps(everything, indent=1) + "\n")
    draw_scores(found, given.output / "images/methods-scores.png")
    draw_directions(scored, given.output / "images/methods-directions.png")
    page = given.output / "evidence/methods.md"
    text = page.read_text().partition(TABLES)[0] if page.exists() else ""
    page.write_text(f"{text}{TABLES}\n{tables(found, moved, baseline, tuning, cost)}\n")


if __name__ == "__main__":
    main()
