"""Embeddings that were not trained: the judges are transformers, which adds rows, and training itself."""

from __future__ import annotations

import pytest
import torch
from models import llama
from torch.nn import functional as F

from reparam.data.unseen import untrained


def found(matrix: torch.Tensor, known: int | None = None) -> list[int]:
    rows = len(matrix)
    return untrained(matrix, rows, rows if known is None else known).nonzero().flatten().tolist()


@pytest.mark.parametrize("mean", [True, False])
def test_rows_that_transformers_adds_for_new_tokens_are_untrained(mean):
    torch.manual_seed(0)
    model = llama(vocab_size=400, hidden_size=64)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.copy_(torch.randn_like(weight))  # of another size than the initializer's
    model.resize_token_embeddings(403, mean_resizing=mean)
    assert found(model.get_input_embeddings().weight.detach()) == [400, 401, 402]


def test_rows_of_tokens_that_never_occur_in_training_are_untrained():
    """Token 0 to 39 are trained, with weight decay; 40 to 49 have rows, but never occur; 50 to 63 are no tokens."""
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(64, 16), torch.nn.Linear(16, 64)
    torch.nn.init.normal_(embedding.weight, std=0.02)
    optimizer = torch.optim.AdamW([*embedding.parameters(), *head.parameters()], lr=0.02, weight_decay=0.1)
    for _ in range(150):
        ids = torch.randint(0, 40, (256,))
        optimizer.zero_grad()
        F.cross_entropy(head(embedding(ids)), (3 * ids + 1) % 40).backward()
        optimizer.step()
    assert found(embedding.weight.detach(), known=50) == list(range(40, 64))


def test_rows_that_equal_others_are_untrained():
    torch.manual_seed(0)
    matrix = torch.randn(20000, 32)
    matrix[[3, 19999]] = matrix[5].clone()
    assert found(matrix) == [3, 5, 19999]


def test_a_matrix_that_was_never_trained_has_no_row_that_stands_out_but_padding():
    weight = llama(vocab_size=500, hidden_size=64, pad_token_id=9).get_input_embeddings().weight.detach()
    assert found(weight, known=480) == [9]  # torch initializes it with zeros
