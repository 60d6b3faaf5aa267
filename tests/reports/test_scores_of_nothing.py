"""Scoring without rows, answers or tokens that carry loss is refused in one sentence; it gives no nan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import reparam

from reparam.data.batches import Encoded
from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.errors import DataError
from reparam.evaluation.score import answer, complete, score_answers, score_loss
from reparam.hf.models import load_base, load_tokenizer


def test_no_rows(base: str) -> None:
    model, tokenizer = load_base(base), load_tokenizer(base)
    with pytest.raises(ValueError, match="no answers to score"):
        score_answers([])
    assert answer(model, tokenizer, []) == []
    assert complete(model, tokenizer, []) == []


def test_no_token_with_loss(base: str, tmp_path: Path) -> None:
    model, tokenizer = load_base(base), load_tokenizer(base)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a b", "completion": " c"}\n')
    encoded = encode(read_rows(file), tokenizer, max_length=64, vocab_size=model.config.vocab_size)
    assert torch.isfinite(torch.tensor(score_loss(model, encoded, tokenizer).value))

    class Silent(Encoded):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            found = super().__getitem__(index)
            return {**found, "labels": torch.full_like(found["labels"], -100)}

    silent = object.__new__(Silent)
    silent.__dict__.update(encoded.__dict__)
    with pytest.raises(ValueError, match="no token of the 1 example carries loss"):
        score_loss(model, silent, tokenizer)


def test_a_prompt_without_tokens(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "c"}]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the prompt is empty"):
        answer(load_base(base), load_tokenizer(base), read_rows(file))
    assert reparam("eval", file, "-b", base) == 2
    assert "rows.jsonl:2: the prompt is empty" in "".join(capsys.readouterr().err.split("\n"))
    assert reparam("generate", "", "--raw", "-b", base) == 2
    assert "nothing to continue" in capsys.readouterr().err
    file.write_text("")
    assert reparam("eval", file, "-b", base) == 2
    assert "the file is empty" in capsys.readouterr().err
