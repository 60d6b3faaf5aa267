"""Adapters of stacked experts are served: each token goes through its experts with its own adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moe
from serving import SMALL, alone, prompts, save

import reparam
from reparam.serve import Engine, Request


def base() -> Any:
    return moe.build("Qwen3Moe", max_position_embeddings=128, num_hidden_layers=1)


def test_requests_with_adapters_of_experts_equal_generate(tmp_path: Path) -> None:
    methods = {"lora": reparam.LoRA(r=2), "dora": reparam.DoRA(r=2), "full": reparam.Full()}
    for seed, (name, method) in enumerate(methods.items()):
        save(base(), tmp_path / name, seed=seed, method=method, targets="experts")
    texts, names = prompts(8), [None, *methods]
    answer = alone(base(), tmp_path)
    expected = [answer(text, names[i % 4], 4) for i, text in enumerate(texts)]
    assert expected[1] != answer(texts[1], None, 4)
    model = base()
    shape = str(model)
    with Engine(model, adapters=tmp_path, limits=SMALL) as engine:
        found = engine.answer([Request(text, names[i % 4], 4) for i, text in enumerate(texts)])
    assert [one.ids for one in found] == expected
    assert str(model) == shape
