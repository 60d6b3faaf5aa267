"""States of PagedAdamW: saved, loaded, exchanged with torch's AdamW, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from paged_runs import BITS, SIZES, make, run, same, sometimes, two_groups

from reparam.errors import StateError
from reparam.optim import PagedAdamW
from reparam.train.state import load_state, restore_optimizer, save_state


@BITS
@pytest.mark.parametrize("other", [{}, {"page": 7000, "budget": 7000}, {"page": 2048, "budget": 3 * 2048}])
def test_a_resumed_run_is_the_same_run(bits: int, other: dict[str, int], tmp_path: Path) -> None:
    straight = PagedAdamW(two_groups(make()), 0.1, bits=bits)
    expected = run(straight, missing=sometimes)

    first = PagedAdamW(two_groups(make()), 0.1, bits=bits, page=4096, budget=4096)
    weights = run(first, range(3), missing=sometimes)
    scheduler = torch.optim.lr_scheduler.ConstantLR(first, factor=1.0)
    save_state(tmp_path, optimizer=first, scheduler=scheduler, progress={})

    second = PagedAdamW(two_groups(make()), 0.7, bits=bits, **other)
    restore_optimizer(second, load_state(tmp_path).optimizer)
    for p, saved in zip([p for g in second.param_groups for p in g["params"]], weights, strict=True):
        p.data.copy_(saved)
    assert same(run(second, range(3, 6), missing=sometimes), expected)


def test_torch_and_we_load_each_others_states() -> None:
    for one, other in ((torch.optim.AdamW, PagedAdamW), (PagedAdamW, torch.optim.AdamW)):
        expected = run(torch.optim.AdamW(make(), 0.1, foreach=False))
        first = one(make(), 0.1)
        weights = run(first, range(3))
        second = other(make(), 0.1)
        second.load_state_dict(first.state_dict())
        for p, saved in zip(second.param_groups[0]["params"], weights, strict=True):
            p.data.copy_(saved)
        assert same(run(second, range(3, 6)), expected)


@BITS
def test_a_state_dict_is_a_copy(bits: int) -> None:
    optimizer = PagedAdamW(make(), bits=bits, page=2048, budget=2048)
    run(optimizer, range(2))
    saved = optimizer.state_dict()
    before = {(i, key): value.clone() for i, state in saved["state"].items() for key, value in state.items()}
    loaded = PagedAdamW(make(), bits=bits)
    loaded.load_state_dict(saved)
    for each in (optimizer, loaded):
        run(each, range(2, 4))
    assert all(torch.equal(saved["state"][i][key], value) for (i, key), value in before.items())


def test_a_state_that_is_loaded_replaces_what_was_there() -> None:
    fresh = PagedAdamW(make(), 0.1)
    used = PagedAdamW(make(), 0.1)
    run(used, range(3))
    used.load_state_dict(fresh.state_dict())
    for p, start in zip(used.param_groups[0]["params"], make(), strict=True):
        p.data.copy_(start)
    assert same(run(used, range(3)), run(fresh, range(3)))


def state(sizes: Any = SIZES, **settings: Any) -> dict[str, Any]:
    optimizer = PagedAdamW(make(sizes), **settings)
    run(optimizer, range(1))
    return optimizer.state_dict()


def amsgrad() -> dict[str, Any]:
    optimizer = torch.optim.AdamW(make(), amsgrad=True)
    run(optimizer, range(1))
    return optimizer.state_dict()


def sgd() -> dict[str, Any]:
    saved = state()
    saved["state"] = {i: {"momentum_buffer": each["exp_avg"]} for i, each in saved["state"].items()}
    return saved


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (lambda: state(bits=8), "the saved state has 8 bits but this optimizer has 32: set bits=8"),
        (
            lambda: state(SIZES[:3]),
            r"the saved state has parameter groups of sizes \[3\], but this optimizer has \[7\]",
        ),
        (
            lambda: state([*SIZES[:6], (1999,)]),
            r"parameter 6: the saved exp_avg is float32 \[1999\], but this optimizer needs float32 \[2000\]",
        ),
        (amsgrad, "amsgrad is not supported: set it to False"),
        (sgd, "parameter 0: the saved state has momentum_buffer, but one of 32 bits has exp_avg, exp_avg_sq, step"),
    ],
    ids=["bits", "groups", "sizes", "amsgrad", "sgd"],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(saved: Any, message: str) -> None:
    optimizer = PagedAdamW(make(), page=2048, budget=4096)
    run(optimizer, range(2))
    before = optimizer.state_dict()
    with pytest.raises(StateError, match=message):
        restore_optimizer(optimizer, saved())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert all(torch.equal(before["state"][i][key], v) for i, s in after["state"].items() for key, v in s.items())
