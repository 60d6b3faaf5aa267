"""Shared code of the benchmarks: models, interleaved timing, counting of bytes, and the Markdown table.

Times are CPU seconds of the process, on one thread. The contestants take turns within a round, in an order that
rotates, so that other load on the machine affects all of them. "A over B" is a ratio A / B: the median of the ratios
within the rounds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping

import peft
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

import reparam

RANK = 16
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model. The vocabulary is small, so that most parameters are in layers with adapters."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int = 1000


LLAMA = Shape(hidden=512, inner=1376, layers=8, heads=8)
DEEP = Shape(hidden=64, inner=176, layers=32, heads=2)
TINY = Shape(hidden=32, inner=48, layers=2, heads=2, vocabulary=100)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: what was measured, the values of reparam and PEFT, limit and goal; None is an empty cell."""

    what: str
    ours: float
    peft: float | None
    limit: float | None
    goal: float | None


@dataclasses.dataclass(frozen=True)
class Times:
    """CPU seconds per call by contestant, one value for each round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def over(self, name: str, other: str) -> float:
        """Median over the rounds of the ratio of the two contestants' times."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True))


def setup(description: str) -> bool:
    """Parse the command line, set one thread and a seed, and return whether `--quick` was given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds, to check that it runs")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    return bool(parser.parse_args().quick)


def interleave(
    work: Mapping[str, Call],
    *,
    rounds: int,
    calls: int = 1,
    before: Mapping[str, Call] | None = None,
    clock: Callable[[], float] = time.process_time,
) -> Times:
    """Time `calls` calls of each contestant in every round, after a warm-up round that does not count.

    `before[name]`, if present, is called before the turn of that contestant and is not timed.
    """
    names = list(work)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if before is not None and name in before:
                before[name]()
            begin = clock()
            for _ in range(calls):
                work[name]()
            seconds[name].append((clock() - begin) / calls)
    return Times({name: found[1:] for name, found in seconds.items()})


def llama(shape: Shape) -> nn.Module:
    """A float32 Llama of this shape with random weights, in eval mode."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=1024,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def twin(model: nn.Module) -> nn.Module:
    """A copy of the model that shares its parameters, so that all contestants read the same memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def with_reparam(model: nn.Module, names: Iterable[str] = ("default",)) -> nn.Module:
    """Attach reparam's LoRA with random factors to all linear layers, once for each name."""
    for name in names:
        adapter = reparam.attach(model, reparam.LoRA(r=RANK, alpha=2 * RANK), name=name)
        randomize(adapter.parameters())
    return model


def with_peft(model: nn.Module, names: Iterable[str] = ("default",)) -> nn.Module:
    """Attach PEFT's LoRA with random factors to all linear layers, once for each name."""
    first, *others = names
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LINEARS))
    wrapped = peft.get_peft_model(model, config, adapter_name=first)
    for name in others:
        wrapped.add_adapter(name, config)
    randomize(p for name, p in wrapped.named_parameters() if ".lora_" in name)
    return wrapped.train(model.training)


@torch.no_grad()
def randomize(parameters: Iterable[Tensor]) -> None:
    """Fill parameters with small random numbers instead of zeros, so that no work can be skipped."""
    for p in parameters:
        p.normal_(0, 0.02)


def matrices(model: nn.Module) -> list[Tensor]:
    """Weights of the linear layers that get adapters, in a model without adapters."""
    return [module.weight.detach() for name, module in model.named_modules() if name.endswith(LINEARS)]


def lora_elements(model: nn.Module) -> int:
    """Number of elements in the factors of one LoRA on all these layers."""
    return sum(RANK * sum(w.shape) for w in matrices(model))


def forward(model: nn.Module, rows: int, tokens: int, adapters: list[str] | None = None) -> Call:
    """A forward pass of random tokens without gradients; for PEFT, `adapters` has one adapter name per row."""
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens))
    more = {} if adapters is None else {"adapter_names": adapters}

    def call() -> None:
        with torch.no_grad():
            model(input_ids=ids, **more)

    return call


def peak_bytes(call: Call) -> int:
    """Peak bytes of torch's allocator during the call, beyond what was held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def kept_bytes(model: nn.Module, forward: Callable[[nn.Module], Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, without the model's parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        out = forward(model)
    out.sum().backward()
    return sum(kept.values())


def show(title: str, rows: list[Row], command: str, *, rival: str = f"PEFT {peft.__version__}") -> None:
    """Print one Markdown table and the command that reproduces it."""
    print(f"### {title}\n\n| measured | reparam | {rival} | limit | to reach |\n|---|---|---|---|---|")
    for row in rows:
        missed = " (missed)" if row.goal is not None and row.ours > row.goal else ""
        cells = (_cell(row.ours) + missed, _cell(row.peft), _cell(row.limit), _cell(row.goal))
        print(f"| {row.what} | " + " | ".join(cells) + " |")
    print(f"\n    {command}\n")


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 2 else f"{value:.2f}"
