"""Packs against TRL's, and losses of packed rows against those of the rows alone, on models of several families."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
import transformers
from models import VOCABULARY, gpt2, llama, mixtral, qwen_moe
from torch import Tensor, nn
from trl import pack_dataset

import reparam
from reparam.adapter.without_sites import put_on
from reparam.data.batches import Collator, Encoded, Report
from reparam.data.packing import Packed, PackedCollator, best_fit
from reparam.hf.chunked import ChunkedLoss
from reparam.hf.packed import packed_collator, unpackable_reason
from reparam.methods.prompts import Prompt

LENGTHS = [7, 3, 12, 5, 9, 2, 12, 4, 6, 11]


def encoded(lengths: list[int] = LENGTHS) -> Encoded:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (sum(lengths),), generator=draw, dtype=torch.int32)
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    loss = torch.rand(sum(lengths), generator=draw) < 0.7
    loss[starts] = False
    report = Report(len(lengths), len(lengths), len(ids), int(loss.sum()), 0, max(lengths), 0, 0)
    none = torch.zeros(len(lengths), dtype=torch.int64)
    return Encoded(ids, loss, starts, sizes, none, [f"rows:{i}" for i in range(len(lengths))], report)


@pytest.mark.parametrize("size", [12, 13, 20, 64, 4096])
def test_packs_are_those_of_trl(size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    lengths = torch.randint(1, min(size, 900) + 1, (300,), generator=draw).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    theirs = pack_dataset(rows, size, "bfd", map_kwargs={"batch_size": None})["seq_lengths"]
    ours = best_fit(lengths, size)
    assert sorted(index for pack in ours for index in pack) == list(range(300))
    assert [[lengths[index] for index in pack] for pack in ours] == list(theirs)


def test_a_pack_holds_its_examples_end_to_end() -> None:
    data = encoded()
    packed = Packed(data, 16)
    assert len(packed) < len(data)
    for index, pack in enumerate(packed.packs):
        item, start = packed[index], 0
        assert item["row"].tolist() == pack
        for row in pack:
            piece = slice(start, start + LENGTHS[row])
            assert torch.equal(item["input_ids"][piece], data[row]["input_ids"])
            assert torch.equal(item["labels"][piece], data[row]["labels"])
            assert item["position_ids"][piece].tolist() == list(range(LENGTHS[row]))
            start += LENGTHS[row]
        assert start == len(item["input_ids"]) <= 16
    assert str(packed) == f"10 examples in {len(packed)} packs of up to 16 tokens, {71 / (16 * len(packed)):.0%} full"


@pytest.mark.parametrize("flat", [False, True])
def test_batches(flat: bool) -> None:
    packs = [{key: torch.arange(n) + 1 for key in ("input_ids", "labels", "position_ids", "row")} for n in (3, 2)]
    batch = PackedCollator(0, flat)(packs)
    assert batch["input_ids"].tolist() == ([[1, 2, 3, 1, 2]] if flat else [[1, 2, 3], [1, 2, 0]])
    assert batch["labels"].tolist() == ([[1, 2, 3, 1, 2]] if flat else [[1, 2, 3], [1, 2, -100]])
    assert batch["row"].tolist() == [1, 2, 3, 1, 2]
    assert "attention_mask" not in batch
    assert batch["use_cache"] is False


def step(model: nn.Module, batch: dict[str, Any], items: int) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    inputs = {key: value for key, value in batch.items() if key != "row"}
    loss = model(**inputs, num_items_in_batch=items).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def gemma3() -> Any:
    """A Gemma 3, whose first layer has a window of four tokens."""
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2, mixtral, qwen_moe, gemma3])
def test_losses_and_gradients_are_those_of_the_rows_alone(make: Callable[[], Any], attention: str) -> None:
    model, data = make(), encoded()
    model.set_attn_implementation(attention)
    assert unpackable_reason(model) is None
    packed = Packed(data, 16)
    items = int(data.loss.sum())
    loss, grads = step(model, packed_collator(model, 0)([packed[i] for i in range(len(packed))]), items)
    expected, others = step(model, Collator(0)([data[i] for i in range(len(data))]), items)
    torch.testing.assert_close(loss, expected)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-5)
    with ChunkedLoss(model, chunk=3):
        chunked, _ = step(model, packed_collator(model, 0)([packed[i] for i in range(len(packed))]), items)
    torch.testing.assert_close(chunked, expected)


@pytest.mark.parametrize("method", ["lora", "dora", "bottleneck", "adalora"])
def test_adapters_on_packs(method: str) -> None:
    model, data = llama(), encoded()
    settings: dict[str, Any] = {"total_steps": 100} if method == "adalora" else {}
    adapter = reparam.attach(model, method, **settings)
    with torch.no_grad():
        for index, parameter in enumerate(adapter.parameters()):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(index))
    packed, items = Packed(data, 16), int(data.loss.sum())
    loss, grads = step(model, packed_collator(model, 0)([packed[i] for i in range(len(packed))]), items)
    expected, others = step(model, Collator(0)([data[i] for i in range(len(data))]), items)
    torch.testing.assert_close(loss, expected)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-5)


REFUSED = [
    ("MambaForCausalLM", {}, "takes no position_ids"),
    ("BloomForCausalLM", {"n_layer": 1}, "takes no position_ids"),
    ("OPTForCausalLM", {"num_hidden_layers": 1, "ffn_dim": 32}, "does not keep the examples of a pack apart"),
    ("JambaForCausalLM", {"num_hidden_layers": 1, "use_mamba_kernels": False}, r"has layers \(linear_attention\)"),
]


@pytest.mark.parametrize(("name", "settings", "reason"), REFUSED)
def test_models_that_would_mix_the_examples_are_refused(name: str, settings: dict[str, Any], reason: str) -> None:
    cls = getattr(transformers, name)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0}
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**sizes, **settings}))
    found = unpackable_reason(model)
    assert found is not None
    assert re.search(reason, found), found
    assert model.training


class Leaky(transformers.LlamaForCausalLM):
    """A Llama that adds a little of the token before to each token, in position ids' scope or not."""

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        found = super().forward(*args, position_ids=position_ids, **kwargs)
        shifted = found.logits.roll(1, dims=1)
        shifted[:, 0] = 0
        found.logits = found.logits + 1e-4 * shifted
        return found


def test_a_small_leak_is_found() -> None:
    torch.manual_seed(0)
    model = Leaky(llama().config).eval()
    assert "does not keep the examples of a pack apart" in str(unpackable_reason(model))


def test_prompts_are_refused() -> None:
    prompted = put_on(Prompt(tokens=2), llama())
    assert "virtual tokens" in str(unpackable_reason(prompted.model))
