"""PagedAdamW: torch's AdamW bit for bit with any pages; which pages move; refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged_runs import BITS, BLOCK_BYTES, give_gradients, make, run, same, sometimes, two_groups
from torch import Tensor, nn

import reparam
from reparam.optim import PagedAdamW, Paging

DEVICES = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
        ),
    ],
)


# ---- bit for bit


@pytest.mark.parametrize("missing", [None, sometimes])
@pytest.mark.parametrize("pages", [{}, {"page": 2048}, {"page": 2048, "budget": 2048}, {"page": 5000, "budget": 9000}])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_torch_adamw_bit_for_bit(missing: Any, pages: dict[str, int], decay: float) -> None:
    settings = {"lr": 0.05, "betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": decay}
    judge = torch.optim.AdamW(two_groups(make()), **settings, foreach=False, fused=False)
    ours = PagedAdamW(two_groups(make()), **settings, **pages)
    assert same(run(ours, missing=missing), run(judge, missing=missing))
    theirs = judge.state_dict()["state"]
    found = ours.state_dict()["state"]
    assert found.keys() == theirs.keys()
    for index in found:
        assert found[index].keys() == theirs[index].keys()
        assert all(torch.equal(found[index][key], theirs[index][key]) for key in found[index])


@DEVICES
@BITS
@given(data=st.data())
def test_pages_change_no_bit(bits: int, device: str, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 3000).map(lambda n: (n,)), min_size=1, max_size=6))
    block = BLOCK_BYTES[bits]
    page = data.draw(st.integers(block, 6 * block))
    budget = data.draw(st.integers(page, 8 * page))
    gaps = data.draw(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=8))

    def missing(step: int, number: int) -> bool:
        return (step, number) in gaps

    unpaged = PagedAdamW(make(sizes, device=device), 0.1, bits=bits)
    paged = PagedAdamW(make(sizes, device=device), 0.1, bits=bits, page=page, budget=budget)
    assert same(run(paged, range(4), missing), run(unpaged, range(4), missing))
    a, b = paged.state_dict()["state"], unpaged.state_dict()["state"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])
    assert paged.paging.peak_resident <= budget
    assert paged.paging.evictions > 0 or paged.paging.total <= budget or gaps


@BITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_updated_in_float32_and_rounded_once(bits: int, dtype: torch.dtype) -> None:
    parameters = make(dtype=dtype)
    optimizer = PagedAdamW(parameters, 0.1, bits=bits, page=4096, budget=8192, weight_decay=0.1)
    masters = [nn.Parameter(p.detach().float()) for p in parameters]
    give_gradients(parameters, 0)
    for master, p in zip(masters, parameters, strict=True):
        master.grad = p.grad.float()
    optimizer.step()
    torch.optim.AdamW(masters, 0.1, weight_decay=0.1, foreach=False).step()
    assert same(parameters, [master.to(dtype) for master in masters])


def test_gradients_in_any_layout() -> None:
    ours, judge = make([(30, 20)]), make([(30, 20)])
    gradient = torch.randn(20, 30).t()
    ours[0].grad, judge[0].grad = gradient, gradient.contiguous()
    PagedAdamW(ours, page=2048).step()
    PagedAdamW(judge, page=2048).step()
    assert same(ours, judge)


# ---- what moves


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 7])
def test_a_step_moves_only_the_pages_that_do_not_fit(slots: int) -> None:
    """Visiting pages in alternating order, P pages with room for S need P - S moves, which is the minimum."""
    pages = 7
    optimizer = PagedAdamW(make([(700,), (1000,)]), page=2048, budget=slots * 2048)
    run(optimizer, range(2))
    before = optimizer.paging
    assert before.total == pages * 2048
    run(optimizer, range(2, 6))
    after = optimizer.paging
    moved = 4 * (pages - slots) * 2048
    assert (after.bytes_in - before.bytes_in, after.bytes_out - before.bytes_out) == (moved, moved)
    assert after.peak_resident == slots * 2048
    waited = after.faults - before.faults
    assert waited == (4 * (pages - 1) if slots == 1 else 0)  # all others came ahead of their update


def test_small_tensors_share_pages() -> None:
    """bitsandbytes pages no tensor below 100,000 elements, as most low-rank factors are."""
    optimizer = PagedAdamW(make([(8, 32)] * 40), bits=8, page=520 * 10, budget=520 * 10)
    run(optimizer, range(2))
    assert optimizer.paging.total == 4 * 520 * 10
    assert optimizer.paging.peak_resident == 520 * 10
    assert optimizer.paging.evictions > 0


def test_pages_of_parameters_without_gradients_do_not_move() -> None:
    optimizer = PagedAdamW(make([(256,)] * 5), page=2048, budget=2048)
    run(optimizer, range(4), missing=lambda step, number: number > 1)
    assert optimizer.paging.bytes_in == 3 * 2048
    assert optimizer.state_dict()["state"].keys() == {0, 1}


def test_without_a_budget_everything_stays() -> None:
    optimizer = PagedAdamW(make(), page=2048)
    assert optimizer.paging == Paging()
    run(optimizer)
    total = optimizer.paging.total
    assert optimizer.paging == Paging(peak_resident=total, total=total)


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    optimizer = PagedAdamW(make(), page=2048, budget=2048, folder=tmp_path)
    run(optimizer)
    assert optimizer.paging.bytes_out > 0
    assert list(tmp_path.iterdir()) == []


# ---- as an optimizer of torch


def test_a_closure_computes_with_gradients() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = PagedAdamW([p], 0.1)

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert torch.allclose(p, torch.tensor(0.9 - 0.001), atol=1e-6)


def test_schedulers_reach_it() -> None:
    ours, judge = make(), make()
    both = PagedAdamW(ours, 0.1, page=2048, budget=4096), torch.optim.AdamW(judge, 0.1, foreach=False)
    plans = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 5) for o in both]
    for step in range(5):
        for parameters, optimizer, plan in zip((ours, judge), both, plans, strict=True):
            give_gradients(parameters, step)
            optimizer.step()
            plan.step()
    assert same(ours, judge)


def test_a_group_that_is_added_later_keeps_the_states_that_are_there() -> None:
    ours, judge = make(), make()
    optimizer = PagedAdamW(ours[:4], 0.1, page=2048, budget=2048)
    other = torch.optim.AdamW(judge[:4], 0.1, foreach=False)
    for o, parameters in ((optimizer, ours), (other, judge)):
        run(o, range(2))
        o.add_param_group({"params": parameters[4:], "lr": 0.3})
        run(o, range(2, 4))
    assert same(ours, judge)


def test_nothing_to_do() -> None:
    parameters = make()
    optimizer = PagedAdamW([{"params": parameters}, {"params": []}])  # as transformers makes groups
    optimizer.step()
    assert same(parameters, make())
    assert optimizer.state_dict()["state"] == {}


def test_an_adapter_binds_to_it() -> None:
    model = models.llama()
    adapter = reparam.attach(model, reparam.LoRA(r=4))
    adapter.bind(PagedAdamW(adapter.parameters(), bits=8))


# ---- refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 16}, "bits=16: expected 32 or 8"),
        ({"page": 2047}, "page=2047 bytes: expected at least 2048, the states of 256 elements at 32 bits"),
        ({"bits": 8, "page": 519}, "page=519 bytes: expected at least 520"),
        (
            {"page": 5000, "budget": 4000},
            r"budget=4000 bytes is less than one page \(4096 bytes\): raise budget or lower page",
        ),
        ({"budget": 0}, r"budget=0 bytes is less than one page \(1048576 bytes"),
        ({"folder": "/no/such"}, "folder '/no/such' does not exist"),
        ({"lr": -1.0, "eps": -2.0}, "lr=-1.0: expected at least 0; eps=-2.0: expected at least 0"),
        ({"lr": float("nan")}, "lr=nan: expected at least 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: expected at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): expected two numbers from 0 to below 1"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        PagedAdamW(make(), **settings)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (
            torch.zeros(3, 2, dtype=torch.float64),
            r"a parameter is float64 \[3, 2\]: expected contiguous float32, bfloat16 or float16",
        ),
        (torch.zeros(3, 2).t(), r"a parameter is float32 \[2, 3\], not contiguous: "),
    ],
)
def test_other_parameters(parameter: Tensor, message: str) -> None:
    optimizer = PagedAdamW(make())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(parameter)]})
    run(optimizer, range(1))  # the group that was refused is not there


def test_sparse_gradients() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="does not support sparse gradients: create the embedding with sparse=False"):
        PagedAdamW(table.parameters()).step()


def test_parameters_on_two_devices() -> None:
    optimizer = PagedAdamW([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, device="meta"))])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match=re.escape("states are on cpu but a parameter is on meta: use one optimizer")):
        optimizer.step()
