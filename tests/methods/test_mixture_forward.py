"""Mixtures and sequences: causality, prompts, caches, two passes, gradient checkpointing."""

import copy
from typing import Any

import models
import pytest
import torch
from cases import error, move
from mixtures import BY_TASK, MASK, SEQUENCE, SMALL, adapted, preset, run
from models import IDS, logits
from torch import Tensor

import reparam
from reparam.core.registry import METHODS

# ---- sequences


def test_nothing_leaks_from_later_tokens() -> None:
    """A gate over all tokens does leak, which shows that the test detects leaks."""
    later = IDS.clone()
    later[:, 5:] = (later[:, 5:] + 11) % 97
    for pool, leaks in (("prompt", False), ("all", True)):
        model, _ = adapted("mole", pool=pool, losses={})
        with reparam.context(model, prompt=3):
            one, other = logits(model), logits(model, later)
        assert (error(one[:, :5], other[:, :5]) > 1e-3) == leaks
    for name in SMALL:
        if name != "mole":
            model, _ = adapted(name)
            assert error(run(model, name)[:, :5], run(model, name, later)[:, :5]) < 1e-6


def test_the_prompt_is_what_comes_before_the_first_label() -> None:
    model, _ = adapted("mole", **SEQUENCE)
    labels = IDS.clone()
    for row, first in enumerate((2, 4, 6)):
        labels[row, :first] = -100
    with torch.no_grad():
        found = model(input_ids=IDS, labels=labels).logits
        with reparam.context(model, prompt=[2, 4, 6]):
            assert torch.equal(model(input_ids=IDS).logits, found)
        with reparam.context(model, prompt=[2, 4, 5]):
            assert not torch.equal(model(input_ids=IDS).logits[2], found[2])
        all_of_it = model(input_ids=IDS, labels=IDS).logits  # the first token is predicted from nothing
        with reparam.context(model, prompt=1):
            assert torch.equal(model(input_ids=IDS).logits, all_of_it)
    with pytest.raises(ValueError, match="the prompt's length is unknown"):
        logits(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_the_prompt(side: str) -> None:
    model, _ = adapted("mole", **SEQUENCE)
    short, junk = IDS[:1, :5], torch.full((1, 2), 5)
    ids = torch.cat([junk, short] if side == "left" else [short, junk], 1)
    keep = slice(2, 7) if side == "left" else slice(0, 5)
    mask = torch.zeros_like(ids)
    mask[:, keep] = 1
    with torch.no_grad(), reparam.context(model, prompt=3):
        padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, keep]
        assert error(padded, model(short).logits) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_generation_with_a_cache_is_full_recomputation(name: str) -> None:
    """For a batch of prompts of different lengths, padded on the left."""
    model, _ = adapted(name, **(SEQUENCE if name == "mole" else {}))
    task = {"tasks": [2, 0, 1]} if name in BY_TASK else {}
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with reparam.context(model, **task):
        told = model.generate(IDS, attention_mask=MASK, **settings)
    ids, mask = IDS, MASK
    for step in range(5):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad(), reparam.context(model, prompt=MASK.sum(1), **task):
            found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        assert error(found, told.logits[step]) < 3e-5
        ids = torch.cat([ids, told.sequences[:, 7 + step, None]], 1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)


@pytest.mark.parametrize("cache", [True, False])
def test_generation_with_a_gate_of_sequences_at_the_output_head(cache: bool) -> None:
    """Generation asks for the logits of the last token alone, and the gate reads the whole prompt."""
    model = models.llama()
    adapter = reparam.attach(model, preset("mole", scope="module", **SEQUENCE), targets=["lm_head", "q_proj"])
    move(adapter, 1, size=0.2)
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": cache}
    told = model.generate(IDS, attention_mask=MASK, **settings) if cache else None
    ids, mask = IDS, MASK
    for _ in range(4):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad(), reparam.context(model, prompt=MASK.sum(1)):
            found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, found.argmax(1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)
    with reparam.context(model, prompt=MASK.sum(1)):
        other = model.generate(IDS, attention_mask=MASK, **settings)
    assert torch.equal(other, ids)
    assert told is None or torch.equal(told, ids)


def test_two_generations_at_once_keep_their_own_gates() -> None:
    from transformers import DynamicCache

    model, _ = adapted("mole", **SEQUENCE)
    prompts, caches = (IDS, IDS.flip(1)), (DynamicCache(config=model.config), DynamicCache(config=model.config))
    nexts = torch.full((3, 1), 9)
    with torch.no_grad():
        for ids, cache in zip(prompts, caches, strict=True):
            model(ids, past_key_values=cache)
        for ids, cache in zip(prompts, caches, strict=True):
            found = model(nexts, past_key_values=cache).logits[:, -1]
            with reparam.context(model, prompt=7):
                assert error(found, model(torch.cat([ids, nexts], 1)).logits[:, -1]) < 1e-5
        copied = copy.deepcopy(caches[0])
        with pytest.raises(RuntimeError, match="the cache holds tokens that this adapter has not seen"):
            model(nexts, past_key_values=copied)


# ---- two passes


def test_xlora_weighs_by_the_hidden_states_of_the_base() -> None:
    """Gates are computed from the plain model's last hidden states; a single expert equals its LoRA."""
    model, adapter = adapted("xlora")
    shapes: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))
    with torch.no_grad():
        hidden = models.llama()(IDS, output_hidden_states=True).hidden_states[-1]
    logits(model)
    assert shapes == [(len(IDS), 1), IDS.shape]  # the first pass computes few logits
    router = adapter.shared.routers["model"]
    expected = torch.softmax(hidden @ router.weight.t() + router.bias, -1)
    for update in adapter.updates.values():
        assert error(update.choice(torch.zeros(3, 7, 1)).weights, expected) < 1e-5


def test_xlora_searches_with_beams_as_without_a_cache() -> None:
    model, _ = adapted("xlora")
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    found = [model.generate(IDS, attention_mask=MASK, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*found)


def test_xlora_refuses_a_cache_that_was_cut_and_a_layer_alone() -> None:
    from transformers import DynamicCache

    model, adapter = adapted("xlora")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        cache.crop(-2)
        with pytest.raises(ValueError, match="the cache holds 5 tokens, but the first pass has seen 7"):
            model(IDS[:, 5:], past_key_values=cache)
    assert not adapter.shared.silent
    fresh, _ = adapted("xlora")
    with pytest.raises(RuntimeError, match="needs a forward pass of the whole model"):
        fresh.model.layers[0].mlp.up_proj(torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="no plain sites"):
        METHODS["xlora"](plain="q_proj", frozen=False)
    other = models.llama()
    reparam.attach(other, METHODS["xlora"](n=2, r=2, frozen=False), targets=["down_proj"])
    with pytest.raises(ValueError, match="input width of the first site, 48"):
        logits(other)


# ---- gradient checkpointing


def checkpointed(model: Any, reentrant: bool) -> None:
    model.train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [n for n in SMALL if n != "poly"])  # which draws at random in training
def test_forwards_one_after_the_other_have_their_own_gates(name: str, reentrant: bool) -> None:
    grads = []
    for check in (False, True):
        model, adapter = adapted(name)
        model.train()
        if check:
            checkpointed(model, reentrant)
        for number in range(2):
            task = {"task": torch.tensor([number, 1, 2])} if name in BY_TASK else {}
            model(input_ids=IDS + number, labels=IDS, attention_mask=MASK, **task).loss.backward()
        grads.append([p.grad for p in adapter.parameters()])
    assert max(error(a, b) for a, b in zip(*grads, strict=True)) < 1e-5


def test_two_forwards_before_their_backwards_are_refused_where_tasks_are_lost() -> None:
    model, _ = adapted("task_gated")
    losses = [model(input_ids=IDS, labels=IDS, task=task).loss for task in (0, 1)]
    sum(losses).backward()  # right without checkpointing
    checkpointed(model, False)
    losses = [model(input_ids=IDS, labels=IDS, task=task).loss for task in (0, 1)]
    with pytest.raises(RuntimeError, match="call backward after each forward"):
        sum(losses).backward()


def test_a_model_wide_gate_needs_the_kind_of_checkpointing_that_keeps_graphs() -> None:
    settings = {"scope": "model", "plain": r".*(k_proj|v_proj|down_proj)", "losses": {}}
    grads = []
    for check in (False, True):
        model, adapter = adapted("llava_mole", **settings)
        if check:
            checkpointed(model, False)
        models.loss(model).backward()
        grads.append([p.grad for p in adapter.parameters()])
    assert max(error(a, b) for a, b in zip(*grads, strict=True)) < 1e-5
    checkpointed(model, True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        models.loss(model).backward()


def test_a_layer_that_is_used_twice_may_be_checkpointed() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)
            return x

    model = Twice()
    adapter = reparam.attach(model, METHODS["mixture"](n=2, r=2, losses={"router_z": 0.1}), targets=["layer"])
    move(adapter, 1)
    model(torch.randn(3, 6)).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
