"""Tiny random models for tasks, saved as bases, and rows that they can learn in a few steps."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

ASSETS = Path(__file__).parents[2] / "assets"
ANIMALS, COLORS = ("dog", "cat", "cow"), ("red", "blue", "green")
SIZES = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 1}


def save(kind: str, folder: Path) -> str:
    """Save a tiny model of this kind, without a head for a task, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "max_position_embeddings": 64}
    made: Any
    if kind == "bert":
        made = BertForMaskedLM(BertConfig(**SIZES, **heads))
    elif kind == "roberta":
        made = RobertaForMaskedLM(RobertaConfig(**SIZES, **heads))
    elif kind == "llama":
        made = LlamaForCausalLM(LlamaConfig(**{**SIZES, "pad_token_id": None}, **heads, eos_token_id=5))
    else:
        sizes = {"vocab_size": 4096, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
        made = T5ForConditionalGeneration(
            T5Config(**sizes, decoder_start_token_id=1, pad_token_id=1, eos_token_id=5)  # type: ignore[arg-type]
        )
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ASSETS / "tiny-python").save_pretrained(folder)
    return str(folder)


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as JSONL."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def rows(task: str, count: int = 48) -> list[dict[str, Any]]:
    """Rows of a task: texts of colors and of animals."""
    draw = random.Random(0)
    found: list[dict[str, Any]] = []
    for _ in range(count):
        words = [draw.choice(draw.choice((ANIMALS, COLORS))) for _ in range(3)]
        word = draw.choice(words)
        same = ANIMALS if word in ANIMALS else COLORS
        kinds = ["animal" if each in ANIMALS else "color" for each in words]
        found.append(
            {
                "classification": {"text": " ".join([word] * draw.randint(1, 4)), "label": kinds[words.index(word)]},
                "regression": {"sentence1": " ".join(words), "sentence2": word, "score": kinds.count("color") / 2},
                "token-classification": {"tokens": words, "ner_tags": [f"B-{kind}" for kind in kinds]},
                "seq2seq": {"input": word, "target": same[0]},
                "embedding": {"anchor": word, "positive": f"{same[0]} {same[1]}"},
            }[task]
        )
    return found
