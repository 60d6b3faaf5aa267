"""Time the checks that find changed parameters, over the same work without them.

A mixed batch reads all factors of its adapters to see whether they have changed; DoRA reads its own parameters before
it uses a kept norm. Limit: 1, the time without checks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import measure as m
import torch

import reparam

Off = contextlib.AbstractContextManager[object]


def over_unchecked(work: m.Call, off: Callable[[], Off], *, rounds: int) -> float:
    """Time of a call over that of the same call within `off()`."""

    def unchecked() -> None:
        with off():
            work()

    return m.interleave({"checked": work, "unchecked": unchecked}, rounds=rounds).over("checked", "unchecked")


def mixed_batch(shape: m.Shape, *, rows: int, tokens: int, rounds: int) -> m.Row:
    """Table row for a batch with one LoRA for each row."""
    names = [f"a{i}" for i in range(rows)]
    model = m.with_reparam(m.llama(shape), names)
    reparam.select(model, names)
    call = m.forward(model, rows, tokens)
    call()

    def off() -> Off:
        return mock.patch.object(model.reparam_state._mixed, "renew", return_value=None)

    what = f"mixed batch, {rows} rows x {tokens} tokens, {rows} adapters: forward over one without checks"
    return m.Row(what, over_unchecked(call, off, rounds=rounds), None, 1.0, 1.1)


def dora(shape: m.Shape, *, rows: int, tokens: int, rounds: int, trains: bool) -> m.Row:
    """Table row for DoRA: a forward pass without gradients, or a training step."""
    model = m.llama(shape)
    adapter = reparam.attach(model, reparam.DoRA(r=m.RANK))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @contextlib.contextmanager
    def off() -> Iterator[None]:
        with (
            mock.patch("reparam.methods.dora.trusted", return_value=True),
            mock.patch("reparam.core.base.trusted", return_value=True),
        ):
            yield

    what = f"DoRA, {rows} rows x {tokens} tokens: {'training step' if trains else 'forward'} over one without checks"
    call = step if trains else m.forward(model, rows, tokens)
    return m.Row(what, over_unchecked(call, off, rounds=rounds), None, 1.0, 1.1)


def main() -> None:
    quick = m.setup(__doc__)
    shape = m.TINY if quick else m.LLAMA
    rounds = 2 if quick else 20
    rows = [
        mixed_batch(shape, rows=4 if quick else 64, tokens=16, rounds=rounds),
        mixed_batch(shape, rows=4 if quick else 8, tokens=64, rounds=rounds),
        dora(shape, rows=1, tokens=16, rounds=rounds, trains=False),
        dora(shape, rows=4, tokens=64, rounds=rounds, trains=True),
    ]
    m.show("Checks for changed parameters", rows, "python benchmarks/stale.py")


if __name__ == "__main__":
    main()
