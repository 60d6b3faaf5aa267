"""Attention over a paged cache: each implementation against softmax in float64, and no leaks between requests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reparam.kernels.paged import attend_padded_, attend_paged_, backend

IMPLEMENTATIONS = [attend_paged_, attend_padded_]
compiled = pytest.mark.skipif(backend() == "torch", reason="numba is not installed")


class Case:
    """Random requests over a cache; rows that no request reads are NaN, and so is the output before."""

    def __init__(self, heads: int, shared: int, width: int, counts: list[int], *, size: float = 1.0) -> None:
        g = torch.Generator().manual_seed(heads * width + sum(counts))
        tokens, rows = len(counts) + 2, sum(counts) + 7
        self.counts, self.total, self.scale = counts, sum(counts), width**-0.5
        self.index = torch.randperm(rows, generator=g)[: self.total]
        whole = torch.full((2, rows, 2 * shared, width), float("nan"))  # each row of the cache has other layers, too
        whole[:, self.index, :shared] = torch.randn(2, self.total, shared, width, generator=g)
        self.keys, self.values = whole[:, :, :shared].unbind(0)
        self.query = size * torch.randn(heads, tokens, width, generator=g).transpose(0, 1)
        firsts = torch.tensor([0, *counts]).cumsum(0)[:-1]
        self.tokens = torch.randperm(tokens, generator=g)[: len(counts)]
        self.spans = torch.stack([self.tokens, firsts, torch.tensor(counts)], 1)
        self.rest = [token for token in range(tokens) if token not in self.tokens.tolist()]

    def run(self, implementation: Callable[..., None], spans: Tensor | None = None) -> Tensor:
        out = torch.full(self.query.shape, float("nan"))
        at = (self.index, self.spans if spans is None else spans, self.scale, self.total)
        implementation(out, self.query, self.keys, self.values, *at)
        return out

    def expected(self) -> Tensor:
        out = torch.full(self.query.shape, float("nan"), dtype=torch.float64)
        repeat = self.query.shape[1] // self.keys.shape[1]
        for token, first, count in self.spans.tolist():
            rows = self.index[first : first + count]
            keys, values = (t[rows].double().repeat_interleave(repeat, 1) for t in (self.keys, self.values))
            scores = torch.einsum("hd,lhd->hl", self.query[token].double(), keys) * self.scale
            out[token] = torch.einsum("hl,lhd->hd", scores.softmax(1), values)
        return out


CASES = {
    "one key": Case(1, 1, 4, [1]),
    "shared heads": Case(6, 2, 8, [1, 2, 3, 4, 5, 63, 64, 65]),
    "heads of their own": Case(3, 3, 5, [130, 1, 67]),
    "wide": Case(4, 1, 80, [9, 200]),
    "large scores": Case(2, 1, 16, [70, 129, 3], size=300.0),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_attention(name: str, implementation: Callable[..., None]) -> None:
    case = CASES[name]
    found, expected = case.run(implementation), case.expected()
    assert found[case.rest].isnan().all()  # tokens of other requests are not written
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6, equal_nan=True)


@compiled
def test_a_request_does_not_depend_on_the_others_or_on_threads() -> None:
    case = Case(6, 2, 64, [1, 300, 40, 65] * 20)
    together = case.run(attend_paged_)
    for number in range(4):
        alone = case.run(attend_paged_, case.spans[number : number + 1])
        token = case.tokens[number]
        assert torch.equal(alone[token], together[token])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(case.run(attend_paged_)[case.tokens], together[case.tokens])
    finally:
        torch.set_num_threads(threads)


@compiled
def test_what_is_not_a_number_is_not_hidden_and_stays_with_its_request() -> None:
    case = Case(2, 1, 8, [70, 70, 5])
    case.keys[case.index[69], 0, 3] = float("nan")
    case.values[case.index[140], 0, 3] = float("inf")
    found = case.run(attend_paged_)[case.tokens]
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
    assert found[2, :, 3].isinf().all()
    assert found[2, :, :3].isfinite().all()
