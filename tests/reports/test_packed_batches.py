"""Sequences end to end in one row: each has its own adapter's output, as if it were alone, or the batch is refused."""

from collections.abc import Callable, Sequence
from typing import Any

import models
import pytest
import torch
from models import VOCABULARY
from selecting import adapted, change, close
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import reparam

LENGTHS = [(3, 5, 2), (1, 1, 1, 1), (4, 4), (1, 6, 1, 1), (2, 3, 3, 1, 7)]
NAMES = ("a", None, "b")


def ids_of(lengths: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))


def positions(lengths: Sequence[int]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def mask(lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A causal mask [1, 1, N, N] within the sequences."""
    span = torch.repeat_interleave(torch.tensor(lengths))
    seen = (span[:, None] == span).tril()[None, None]
    return seen if dtype is torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)


def qwen3() -> Any:
    """A Qwen3: norms of the heads, [1, N, heads, width]."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(**models.TOKENS, **sizes, num_key_value_heads=2, head_dim=8, initializer_range=0.1)
    config.tie_word_embeddings = False
    return models.build(Qwen3ForCausalLM, config)


class Tokens(nn.Module):
    """A model without attention, of ids [1, N] or [N]; or of vectors, if it has no embedding."""

    def __init__(self, embeds: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16) if embeds else None
        self.norm, self.up, self.head = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        return self.head(self.up(self.norm(x)).relu())


def names_of(lengths: Sequence[int]) -> list[str | None]:
    return [NAMES[i % 3] for i in range(len(lengths))]


@torch.no_grad()
def alone(model: nn.Module, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """The outputs of each sequence alone under its adapter, end to end [N, ...]."""
    found = []
    for name, part in zip(names_of(lengths), ids.split(list(lengths), 1), strict=True):
        with reparam.select(model, name):
            output = model(part)
            found.append((output if isinstance(output, Tensor) else output.logits)[0])
    return torch.cat(found)


@torch.no_grad()
def packed(model: nn.Module, ids: Tensor, lengths: Sequence[int], spans: Any = None, **more: Any) -> Tensor:
    if hasattr(model, "config"):  # with a cache, transformers does not read the starts of sequences
        more = {"use_cache": False, **more}
    with reparam.select(model, names_of(lengths), spans=lengths if spans is None else spans):
        output = model(ids, **more)
    return output if isinstance(output, Tensor) else output.logits[0]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.qwen_moe, qwen3])
@pytest.mark.filterwarnings("ignore:targets. skipped")
def test_each_sequence_is_that_sequence_alone(make: Callable[[], Any], lengths: tuple[int, ...]) -> None:
    model = adapted(make())
    for seed in range(2):
        ids = ids_of(lengths, seed)
        expected = alone(model, ids, lengths)
        assert close(packed(model, ids, lengths, position_ids=positions(lengths)), expected)
        assert close(packed(model, ids, lengths, "position_ids", position_ids=positions(lengths)), expected)


@pytest.mark.parametrize("method", ["full", "dora", "lora", "bitfit"])
def test_norms_embeddings_heads_and_biases(method: str) -> None:
    lengths = (3, 5, 2)
    model = qwen3() if method != "bitfit" else models.llama(attention_bias=True, mlp_bias=True)
    targets = "all-linear" if method == "bitfit" else "everything"
    for seed, name in enumerate(("a", "b")):
        settings = {} if method != "lora" else {"modules_to_save": ["lm_head", "norm"], "r": 2}
        targets = ["q_norm", "embed_tokens", "up_proj"] if method == "lora" else targets
        change(reparam.attach(model, method, name=name, targets=targets, **settings), seed)
    ids = ids_of(lengths)
    found = packed(model, ids, lengths, position_ids=positions(lengths))
    assert close(found, alone(model, ids, lengths))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_keeps_sequences_apart(dtype: torch.dtype) -> None:
    lengths = (3, 5, 2)
    model, ids = adapted(models.llama()), ids_of(lengths)
    more = {"attention_mask": mask(lengths, dtype), "position_ids": positions(lengths)}
    assert close(packed(model, ids, lengths, **more), alone(model, ids, lengths))
    more["attention_mask"][0, 0, 4, 1] = True if dtype is torch.bool else 0.0
    with pytest.raises(ValueError, match="attention_mask lets tokens of one sequence see another"):
        packed(model, ids, lengths, **more)


@pytest.mark.parametrize("whole", [[], ["norm"], ["head", "embed"]])
@pytest.mark.parametrize("flat", [False, True])
def test_models_without_attention_need_no_positions(flat: bool, whole: list[str]) -> None:
    lengths = (3, 5, 2)
    targets = [name for name in ("embed", "up", "head") if name not in whole]
    torch.manual_seed(0)
    model = adapted(Tokens().eval(), targets=targets, modules_to_save=whole)
    ids = ids_of(lengths)
    found = packed(model, ids[0] if flat else ids, lengths)
    assert close(found.squeeze(0), alone(model, ids, lengths))


def test_vectors_end_to_end() -> None:
    lengths = (3, 5, 2)
    torch.manual_seed(0)
    model, x = adapted(Tokens(embeds=False).eval(), targets=["up", "head"]), torch.randn(10, 16)
    rows = [packed(model, x[None], lengths)[0], packed(model, x, lengths)]
    expected = alone(model, x[None], lengths)
    assert all(close(found, expected) for found in rows)


def test_a_selection_serves_other_lengths_that_the_forward_tells() -> None:
    model = adapted(models.llama())
    with reparam.select(model, ["a", None, "b"], spans="position_ids"), torch.no_grad():
        for lengths in [(3, 5, 2), (1, 1, 1), (6, 2, 4)]:
            ids = ids_of(lengths)
            found = model(ids, position_ids=positions(lengths), use_cache=False).logits[0]
            with reparam.select(model, None):
                expected = alone(model, ids, lengths)
            assert close(found, expected)
        with pytest.raises(ValueError, match=r"3 adapter names, one per sequence, but position_ids holds 2 sequences"):
            model(ids, position_ids=positions((6, 6)))
        with pytest.raises(ValueError, match="called without position_ids="):
            model(ids)


def test_rows_and_packed_sequences_take_turns() -> None:
    model, lengths = adapted(models.llama()), (4, 4, 4)
    ids = ids_of(lengths)
    expected = alone(model, ids, lengths)
    for _ in range(2):
        assert close(packed(model, ids, lengths, position_ids=positions(lengths)), expected)
        with reparam.select(model, ["a", None, "b"]), torch.no_grad():
            assert close(model(ids.view(3, 4)).logits.flatten(0, 1), expected)


def test_sequences_that_depend_on_each_other_are_refused() -> None:
    model, lengths = adapted(models.llama()), (3, 5, 2)
    ids = ids_of(lengths)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"sequences of the packed batch .* depend on each other"):
            packed(model, ids, lengths)
    with pytest.raises(ValueError, match="position_ids continue at token 3, where a sequence starts"):
        packed(model, ids, lengths, position_ids=torch.arange(10)[None])
    with pytest.raises(ValueError, match="position_ids continue at token 3"):
        packed(model, ids, lengths, position_ids=positions((4, 4, 2)))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q is \[0, 4, 10\]"):
        packed(model, ids, lengths, position_ids=positions(lengths), cu_seq_lens_q=torch.tensor([0, 4, 10]))
    found = packed(model, ids, lengths, position_ids=positions(lengths))
    assert close(found, alone(model, ids, lengths))
    with pytest.raises(ValueError, match="use_cache=False"):
        packed(model, ids, lengths, position_ids=positions(lengths), use_cache=True)


class Sorted(nn.Module):
    """A layer that sorts tokens, as one before experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        order = (ids[0] % 5).argsort(stable=True)
        x = self.inner(self.embed(ids)[:, order])
        return self.head(x[:, order.argsort()])


def test_tokens_in_another_order_are_refused() -> None:
    torch.manual_seed(0)
    model, lengths = adapted(Sorted().eval(), targets=["inner", "head"]), (3, 5, 2)
    for seed in range(20):
        with pytest.raises(ValueError, match=r"cannot map an activation of shape \[1, 10, 16\]"):
            packed(model, ids_of(lengths, seed), lengths)


class Pooled(nn.Module):
    """A model with one result for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pool = nn.Embedding(VOCABULARY, 16), Pooler()

    def forward(self, ids: Tensor) -> Tensor:
        return self.pool(self.embed(ids))


class Pooler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x[:, 0])


@pytest.mark.parametrize("settings", [{"targets": ["dense"]}, {"targets": ["embed"], "modules_to_save": ["pool"]}])
@pytest.mark.filterwarnings("ignore:LoRA. the rank")
def test_one_result_for_all_sequences_is_refused(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = adapted(Pooled().eval(), **settings)
    with pytest.raises(ValueError, match=r"cannot map an activation|does not belong to tokens"):
        packed(model, ids_of((3, 5, 2)), (3, 5, 2))


def test_spans_that_do_not_fit() -> None:
    model = adapted(models.llama())
    ids = ids_of((3, 5, 2))
    for spans in ([3, 5], [3, 5, 0], [3, 5, -1], [3, 5, 2.5]):
        with pytest.raises(ValueError, match="one number of tokens, 1 or more, for each name"):
            reparam.select(model, ["a", "b", None], spans=spans)
    with pytest.raises(ValueError, match="one of position_ids, cu_seq_lens_q"):
        reparam.select(model, ["a", "b"], spans="lengths")
    with pytest.raises(ValueError, match="spans"):
        reparam.select(model, "a", spans=[3])
    for batch in (ids[:, :9], ids.view(2, 5), ids.repeat(2, 1)):
        with pytest.raises(ValueError, match=r"spans of 10 tokens in all, but the batch has shape"):
            packed(model, batch, (3, 5, 2))


def test_lengths_of_flash_attention() -> None:
    """A model gets `cu_seq_lens_q` from transformers' collator; those without FlashAttention ignore it."""
    lengths = (3, 5, 2)
    model, ids = adapted(models.llama()), ids_of(lengths)
    more = {"position_ids": positions(lengths), "cu_seq_lens_q": torch.tensor([0, 3, 8, 10], dtype=torch.int32)}
    assert close(packed(model, ids, lengths, "cu_seq_lens_q", **more), alone(model, ids, lengths))


def test_the_end_of_a_selection_restores_the_spans() -> None:
    lengths = (3, 5, 2)
    model, ids = adapted(models.llama()), ids_of(lengths)
    expected = alone(model, ids, lengths)
    reparam.select(model, names_of(lengths), spans=lengths)
    with reparam.select(model, "a"):
        pass
    with torch.no_grad():
        assert close(model(ids, position_ids=positions(lengths), use_cache=False).logits[0], expected)
