"""Twenty rows of each format as public data sets have them, with the parts that carry loss beside each (`rows/`).

The masks are written by hand: each answer with the token that ends its turn. Those of tool calls and of reasoning are
the assistant masks of transformers for TRL's twin of Qwen3's template, computed from these rows without this package.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import pytest
from chat_tokenizers import make

from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.data.templates import chosen

ROWS = Path(__file__).with_name("rows")
TEMPLATES = {"tool_calls": "qwen3_training", "reasoning": "qwen3_training"}


def tokenizer_for(name: str):
    tokenizer = make(None)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chosen(TEMPLATES.get(name, "chatml"), tokenizer)
    return tokenizer


def expected(name: str) -> list[list[str]]:
    return json.loads((ROWS / f"{name}.masks.json").read_text(encoding="utf-8"))


NAMES = sorted(file.stem for file in ROWS.glob("*.jsonl"))


@pytest.mark.parametrize("name", NAMES)
def test_masks_of_rows_as_people_have_them(name):
    tokenizer, file = tokenizer_for(name), ROWS / f"{name}.jsonl"
    encoded = encode(read_rows(file), tokenizer, max_length=2000)
    assert len(encoded) == len(expected(name)) == 20  # no row is split or left out
    for i, wanted in enumerate(expected(name)):
        example = encoded[i]
        ids, loss = example["input_ids"].tolist(), (example["labels"] >= 0).tolist()
        assert encoded.sources[i] == f"{file}:{i + 1}"
        if wanted[0] == tokenizer.decode(ids):
            loss[0] = True  # nothing predicts the first token of a row without a prompt
        runs = [
            [token for token, _ in run]
            for learned, run in groupby(zip(ids, loss, strict=True), lambda p: p[1])
            if learned
        ]
        assert [tokenizer.decode(run) for run in runs] == wanted, f"{name}.jsonl:{i + 1}"


def test_every_format_has_its_rows():
    assert NAMES == [
        "alpaca",
        "completion",
        "conversational",
        "openai",
        "prompt_messages",
        "reasoning",
        "sharegpt",
        "text",
        "tool_calls",
    ]


@pytest.mark.parametrize("name", ["openai", "sharegpt", "alpaca", "conversational", "prompt_messages"])
def test_prompts_of_chats_hold_all_that_is_asked(name):
    """The content of every message is in the tokens, so that no mask is right because a row lost its question."""
    tokenizer = tokenizer_for(name)
    rows = read_rows(ROWS / f"{name}.jsonl")
    encoded = encode(rows, tokenizer, max_length=2000)
    for i, row in enumerate(rows):
        text = tokenizer.decode(encoded[i]["input_ids"])
        contents = [message["content"] for message in row.messages]
        assert all(content in text for content in contents)
        assert text.count("<|im_end|>") == len(contents)
