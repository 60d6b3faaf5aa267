"""Find the tokens that a base model never saw: those whose embeddings were not trained.

Training moves the embedding of every token that occurs. What never occurs stays where it was initialized, is drawn to
zero by weight decay, or was added later as a copy or as a mean of others. Tokens of chat templates are such tokens in
many base models, and an adapter that leaves the embeddings frozen cannot learn them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

CLOSE = 0.2  # of what is usual, for the norm of a row and for its distance from the mean
FEWEST = 8  # rows beyond the tokenizer's vocabulary that show what an untrained row looks like
BLOCK = 8192  # rows that are read at a time


class Matrix(Protocol):
    """An embedding [V, D], or the part of a file that holds one: rows are read as `matrix[start:end]`."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """The rows, [n, D]."""


def untrained(matrix: Matrix, rows: int, known: int) -> Tensor:
    """Which rows of an input embedding with `rows` rows look untrained: [rows] bool.

    `known` is the size of the tokenizer's vocabulary; rows from there on belong to no token. A row counts as untrained
    if it is close to zero or to the mean of all rows, if it equals another row bit for bit, and if its norm is like
    those of the rows without a token, while that of most rows is not. A model that was never trained has none.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...>
    >>> weight = torch.randn(100, 16)
    >>> weight[7] = 0
    >>> untrained(weight, 100, 100).nonzero().tolist()
    [[7]]
    """
    norms, sums, probe = [], torch.zeros(()), None
    for block in _blocks(matrix, rows):
        if probe is None:
            probe = torch.rand(block.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        norms.append(torch.stack([block.norm(dim=1), block @ probe]))
        sums = sums + block.sum(0)
    size, mark = torch.cat(norms, dim=1)  # [rows] each; equal rows have equal marks
    mean = sums / rows
    away = torch.cat([(block - mean).norm(dim=1) for block in _blocks(matrix, rows)])
    usual = size[:known].median()
    found = (size < CLOSE * usual) | (away < CLOSE * away[:known].median())
    found |= _repeated(torch.stack([size, mark], dim=1))
    spare = size[known:]
    if len(spare) >= FEWEST:
        spread = 4 * spare.std().clamp(min=1e-3 * float(usual))
        if (usual - spare.mean()).abs() > 2 * spread:
            found |= (size - spare.mean()).abs() < spread
    return found


def _blocks(matrix: Matrix, rows: int) -> Iterator[Tensor]:
    for start in range(0, rows, BLOCK):
        yield matrix[start : min(rows, start + BLOCK)].double()


def _repeated(marks: Tensor) -> Tensor:
    """Which rows of a matrix [n, k] equal another one: [n] bool."""
    _, which, counts = torch.unique(marks, dim=0, return_inverse=True, return_counts=True)
    return counts[which] > 1
