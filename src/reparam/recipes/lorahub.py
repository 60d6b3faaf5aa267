"""LoraHub: weights for saved adapters from a few examples of a new task (Huang et al. 2023, arXiv 2307.13269).

    minimize over w in [-bound, bound]^N      mean over examples of their mean cross entropy per token  +  l1 · mean |w|

The search uses only loss values (`reparam.combine.search`), and the base and the adapters never change. The candidates
of a generation are rows of one batch (`reparam.combine.candidates`). The result is an ordinary adapter with the best
weights found. It is compared with the base, the mean and the sum of the adapters, and the best single adapter.

The paper's released code differs in two ways. It divides the loss by the number K of examples again if they are in one
batch, so its penalty counts K times as much. It sums A and B separately (`space="factor"`). The paper's text uses the
sum of |w| instead of the mean (`l1_reduction`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from reparam.adapter.attach import remove
from reparam.combine.blend import Blend, blend, read_operand
from reparam.combine.candidates import Gates, candidates
from reparam.combine.search import BestPoint, check_search, search
from reparam.core.progress import waiting
from reparam.core.text import counted
from reparam.data.batches import Collator, Encoded, padding_id
from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.evaluation.terminal import say
from reparam.hf.chunked import RowLosses
from reparam.hf.models import vocabulary
from reparam.hf.open import open_model
from reparam.io.outputs import check_adapter_folder
from reparam.recipes.compose import folders_of, write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REDUCTIONS = ("mean", "sum")
SHOWN = 12  # number of the latest candidates in the table


@dataclasses.dataclass(frozen=True)
class Line:
    """One combination of the adapters, and its losses in nats per token."""

    name: str
    weights: tuple[float, ...]
    """One weight per adapter [N]."""
    few: float
    """Mean loss over the examples of the search."""
    valid: float | None
    """Mean loss over the held-out rows; None without such rows."""


@dataclasses.dataclass(frozen=True)
class Hub:
    """The result of the LoraHub search, and its baselines."""

    found: BestPoint
    lines: tuple[Line, ...]
    """The losses of the baselines and of the result."""
    blend: Blend
    """The sum of the adapters with the best weights."""
    forwards: int
    """Number of forward passes of the search."""

    def line(self, name: str) -> Line:
        """The line whose name starts with `name`: "base", "mean", "sum", "best single" or "found"."""
        return next(line for line in self.lines if line.name.startswith(name))


class Losses:
    """The loss of each candidate: the mean over examples of the mean cross entropy per token, in nats."""

    def __init__(
        self, model: nn.Module, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, gates: Gates, *, batch: int
    ) -> None:
        self.model = model
        self.row_losses = RowLosses(model)
        self.encoded = encoded
        self.collate = Collator(padding_id(tokenizer))
        self.gates = gates
        self.batch = batch
        self.forwards = 0

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        """points [K, N] -> losses [K] in float64. Each pair of point and example is a row of a batch."""
        count = len(self.encoded)
        found = torch.zeros(len(points) * count, dtype=torch.float64)
        for rows in torch.arange(len(found)).split(self.batch):
            examples = self.collate([self.encoded[i] for i in (rows % count).tolist()])
            self.gates.rows = points[rows // count]
            found[rows] = self._rows(examples)
            self.forwards += 1
        return found.view(len(points), count).mean(1)

    def _rows(self, examples: dict[str, Tensor]) -> Tensor:
        """The mean cross entropy per token of each row, [B] in float64."""
        device = next(self.model.parameters()).device
        inputs = {key: examples[key].to(device) for key in ("input_ids", "attention_mask", "labels")}
        return self.row_losses(inputs).double().cpu() / (examples["labels"][:, 1:] != -100).sum(1)


def objective(
    losses: Callable[[Tensor], Tensor], *, l1: float = 0.05, l1_reduction: str = "mean"
) -> Callable[[Tensor], list[float]]:
    """The objective of the search: points [K, N] -> K values, the losses + l1 · the mean (or the sum) of |w|.

    Raises ValueError if `l1` is negative or not finite, or the reduction is neither "mean" nor "sum".
    """
    if not (math.isfinite(l1) and l1 >= 0):
        raise ValueError(f"l1={l1!r}: expected a finite number of at least 0")
    if l1_reduction not in REDUCTIONS:
        raise ValueError(f"l1_reduction={l1_reduction!r}: expected one of {', '.join(REDUCTIONS)}")

    def value(points: Tensor) -> list[float]:
        size = points.abs().mean(1) if l1_reduction == "mean" else points.abs().sum(1)
        return [float(v) for v in losses(points) + l1 * size]

    return value


def search_to(
    output: Path,
    adapters: Sequence[str],
    few: Path,
    *,
    valid: Path | None = None,
    space: str = "delta",
    rank: int | None = None,
    budget: int = 40,
    optimizer: str = "cobyla",
    seed: int = 0,
    bound: float = 1.5,
    l1: float = 0.05,
    l1_reduction: str = "mean",
    max_length: int = 1024,
    batch: int = 64,
    base: str | None = None,
    dtype: str = "auto",
    format: str = "reparam",
    overwrite: bool = False,
    console: Console,
) -> Hub:
    """Search for weights on the rows of `few`, write the best sum as an adapter, and print its losses and baselines.

    `valid` adds losses on held-out rows. The default base is the one that the first adapter was trained on. `budget` is
    the number of candidates, each evaluated on all examples, without the baselines. `optimizer` is "cobyla" or "cma",
    and `seed` is for "cma". Raises ValueError for invalid rows, settings or
    adapters, and if `output` is not empty, unless `overwrite` is set and it holds an adapter.
    """
    folders = folders_of(adapters, output)
    check_adapter_folder(output, format, overwrite=overwrite)
    check_search(len(folders), bound=bound, budget=budget, optimizer=optimizer)
    operands = [read_operand(folder) for folder in folders]
    model, tokenizer, first = open_model(base, folders[0], dtype=dtype)
    assert first is not None
    remove(model, first.name)
    size = vocabulary(model)
    encoded = encode(read_rows(few), tokenizer, max_length=max_length, vocab_size=size)
    held_out = None
    if valid is not None:
        held_out = encode(read_rows(valid), tokenizer, max_length=max_length, vocab_size=size)
    model.eval()
    n = len(operands)
    with candidates(model, operands, space=space) as gates:
        losses = Losses(model, encoded, tokenizer, gates, batch=batch)
        value = objective(losses, l1=l1, l1_reduction=l1_reduction)
        with waiting("searching for weights", budget, unit="candidates") as advance:

            def measured(points: Tensor) -> list[float]:
                values = value(points)
                advance(len(values))
                return values

            found = search(measured, n, bound=bound, budget=budget, optimizer=optimizer, seed=seed)
        say(console, _tried_table(found, losses.forwards, budget))
        forwards = losses.forwards
        lines = _compared(found, folders, losses, held_out, tokenizer)
    made = blend([s.record for s in operands], found.weights, space=space, rank=rank, base=model)
    write(made, output, folders, found.weights, format=format, console=console)
    hub = Hub(found, lines, made, forwards)
    say(console, _lines_table(hub))
    say(
        console,
        f"{counted(len(found.history), 'candidate')} on {counted(len(encoded), 'example')} in "
        f"{counted(forwards, 'forward pass', 'forward passes')}",
    )
    return hub


def _compared(
    found: BestPoint,
    folders: Sequence[Path],
    losses: Losses,
    held_out: Encoded | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Line, ...]:
    n = len(folders)
    single = torch.eye(n, dtype=torch.float64)
    alone = losses(single)
    best = int(alone.nan_to_num(math.inf).argmin())
    folder = folders[best].parent if folders[best].name == "adapter" else folders[best]  # the run's folder if in a run
    ways = {
        "base": [0.0] * n,
        "mean": [1 / n] * n,
        "sum": [1.0] * n,
        f"best single ({folder.name})": single[best].tolist(),
        "found": list(found.weights),
    }
    points = torch.tensor(list(ways.values()), dtype=torch.float64)
    few = losses(points).tolist()
    on_valid = None
    if held_out is not None:
        on_valid = Losses(losses.model, held_out, tokenizer, losses.gates, batch=losses.batch)(points).tolist()
    return tuple(
        Line(name, tuple(weights), few[i], None if on_valid is None else on_valid[i])
        for i, (name, weights) in enumerate(ways.items())
    )


def _tried_table(found: BestPoint, forwards: int, budget: int) -> Table:
    """The latest candidates, with the best one in green."""
    tried = list(enumerate(found.history, 1))
    table = Table(
        title=f"{len(tried)} of {counted(budget, 'candidate')}, {counted(forwards, 'forward pass', 'forward passes')}"
    )
    for name in ("", "loss + penalty", "weights"):
        table.add_column(name, justify="left" if name == "weights" else "right", no_wrap=name != "weights")
    for number, one in tried[-SHOWN:]:
        told = Text(f"{one.value:.4f}", "bold green" if one.value == found.value else "")
        table.add_row(str(number), told, " ".join(f"{w:+.2f}" for w in one.weights))
    return table


def _lines_table(hub: Hub) -> Table:
    held_out = hub.lines[0].valid is not None
    table = Table(title="loss in nats per token, mean over examples")
    for name in ("", "few examples", *(["held out"] if held_out else []), "weights"):
        table.add_column(name, justify="right" if name in ("few examples", "held out") else "left")
    for line in hub.lines:
        valid = [f"{line.valid:.4f}"] if line.valid is not None else []
        table.add_row(line.name, f"{line.few:.4f}", *valid, " ".join(f"{w:+.2f}" for w in line.weights))
    return table
