"""The loss in chunks against transformers' own, on models of several families, with and without adapters."""

from typing import Any

import pytest
import torch
from models import ALL, IDS, build, llama, tied_llama
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BartConfig,
    BartForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)
from transformers.trainer_pt_utils import LabelSmoother

import reparam
from reparam.errors import NotChunked
from reparam.hf.chunked import ChunkedLoss, RowLosses, Tail

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LABELS = IDS.clone()
LABELS[0, :4] = -100
LABELS[2] = -100  # a row without loss
MODELS = {
    **{name: ALL[name] for name in ("llama", "tied_llama", "gpt2", "qwen_moe")},
    "gemma2": lambda: build(Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "granite": lambda: build(GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=8.0)),
    "cohere": lambda: build(CohereForCausalLM, CohereConfig(**SIZES)),
}


def both(model: nn.Module, **inputs: Any) -> tuple[tuple[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients by transformers, and in chunks of two tokens."""

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(input_ids=IDS, labels=LABELS, **inputs).loss
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), grads

    stock = run()
    with ChunkedLoss(model, chunk=2):
        found = run()
    assert "forward" not in vars(model.get_output_embeddings())
    return stock, found


def check(model: nn.Module, **inputs: Any) -> None:
    (loss, grads), (found, others) = both(model, **inputs)
    torch.testing.assert_close(found, loss)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    check(MODELS[name]())


def test_a_frozen_head_and_a_count_of_items() -> None:
    model = llama()
    for parameter in model.lm_head.parameters():
        parameter.requires_grad_(False)
    check(model, num_items_in_batch=torch.tensor(23))


def test_the_loss_of_a_router_is_added() -> None:
    model = ALL["mixtral"]()
    check(model, output_router_logits=True)
    without = model(input_ids=IDS, labels=LABELS).loss
    assert not torch.isclose(model(input_ids=IDS, labels=LABELS, output_router_logits=True).loss, without)


ADAPTED = [
    ("lora", llama, {"r": 2}),
    ("dora", llama, {"r": 2}),
    ("adalora", llama, {"init_r": 4, "target_r": 2, "total_steps": 100}),
    ("intrinsic", llama, {}),
    ("full", llama, {}),
    ("lora", tied_llama, {"r": 2, "tie": True}),
    ("dora", tied_llama, {"r": 2, "tie": True}),
]


@pytest.mark.parametrize(("method", "model", "settings"), ADAPTED)
def test_adapted_heads(method: str, model: Any, settings: dict[str, Any]) -> None:
    base = model()
    adapter = reparam.attach(base, method, targets=["all-linear", "lm_head"], **settings)
    with torch.no_grad():
        for index, parameter in enumerate(adapter.parameters()):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(index))
    assert ChunkedLoss(base)._trained
    check(base)


def test_a_head_that_is_trained_in_full() -> None:
    model = llama()
    reparam.attach(model, "lora", r=2, modules_to_save=["lm_head"])
    (_, grads), _ = both(model)
    assert any("lm_head" in name for name in grads)
    check(model)


@pytest.mark.parametrize("storage", [reparam.NF4(), reparam.Int8()])
def test_quantized_heads(storage: Any) -> None:
    model = llama()
    reparam.quantize(model, storage, targets=["all-linear", "lm_head"])
    reparam.attach(model, "lora", r=2)
    check(model)
    assert not ChunkedLoss(model)._trained


def test_dropout_of_an_adapted_head_is_the_same_in_both_passes() -> None:
    """Numerical derivatives along one direction, with the same random numbers in each evaluation."""
    model = llama().double()
    adapter = reparam.attach(model, "lora", r=2, dropout=0.5, targets=["lm_head"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3)
    model.train()
    A = next(iter(adapter.parameters()))
    direction = torch.randn_like(A)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return model(input_ids=IDS, labels=LABELS).loss

    with ChunkedLoss(model, chunk=2):
        loss().backward()
        slope = float((A.grad * direction).sum())
        with torch.no_grad():
            A += 1e-2 * direction
        up = loss().item()
        with torch.no_grad():
            A -= 2e-2 * direction
        down = loss().item()
    assert slope == pytest.approx((up - down) / 2e-2, rel=2e-2)


class Largest(TorchDispatchMode):
    """Records the number of entries of the largest tensor that any operation returns."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(x.numel() for x in tree_leaves(found) if isinstance(x, Tensor))])
        return found


@pytest.mark.parametrize("trained", [False, True])
def test_no_tensor_is_as_large_as_the_logits(trained: bool) -> None:
    model = llama(vocab_size=5000)
    reparam.attach(model, "lora", r=2, targets=["q_proj", "lm_head"] if trained else ["q_proj"])

    def most() -> int:
        with Largest() as seen:
            model(input_ids=IDS, labels=IDS).loss.backward()
        return seen.most

    logits = IDS.numel() * 5000
    assert most() >= logits
    with ChunkedLoss(model, chunk=2):
        assert most() <= max(2 * 5000, 5000 * 32)  # the head's own matrix is 5000 x 32


@pytest.mark.parametrize("chunk", [2, 10**9])
def test_label_smoothing_is_that_of_transformers(chunk: int) -> None:
    model = llama()
    expected = LabelSmoother(0.1)(model(input_ids=IDS), LABELS, shift_labels=True)
    with ChunkedLoss(model, smoothing=0.1, chunk=chunk):
        found = model(input_ids=IDS, labels=LABELS).loss
    torch.testing.assert_close(found, expected)


def test_bfloat16() -> None:
    model = llama()
    reparam.attach(model, "lora", r=2)
    with torch.autocast("cpu", torch.bfloat16):
        (loss, grads), (found, others) = both(model)
    torch.testing.assert_close(found, loss, rtol=1e-3, atol=1e-3)
    for name, grad in grads.items():
        assert (others[name] - grad).norm() <= 0.02 * grad.norm(), name


def test_forward_passes_without_labels_are_not_changed() -> None:
    model = llama()
    logits, tokens = model(input_ids=IDS).logits, model.generate(IDS, max_new_tokens=3, do_sample=False)
    with ChunkedLoss(model):
        assert torch.equal(model(input_ids=IDS).logits, logits)
        assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), tokens)
        assert model(input_ids=IDS, labels=LABELS).logits.shape == (3, 0, 97)
        assert torch.equal(model(input_ids=IDS).logits, logits)
    assert model(input_ids=IDS, labels=LABELS).logits.shape == (3, 7, 97)


def test_a_batch_without_loss() -> None:
    model = llama()
    with ChunkedLoss(model):
        loss = model(input_ids=IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=4).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_losses_of_rows(name: str) -> None:
    model = MODELS[name]()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": LABELS}
    log = model(input_ids=IDS).logits[:, :-1].double().log_softmax(-1)
    expected = F.nll_loss(log.flatten(0, 1), LABELS[:, 1:].flatten(), reduction="none").view(3, -1).sum(1)
    torch.testing.assert_close(RowLosses(model)(inputs).double(), expected, rtol=1e-5, atol=1e-5)
    assert model(**inputs).logits.shape == (3, 7, 97)


class Squared(LlamaForCausalLM):
    """A model with a function of its own after the head."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = found.logits**2
        found.loss = self.loss_function(found.logits, labels, found.logits.shape[-1]) if labels is not None else None
        return found


def test_other_models_are_refused_with_the_reason() -> None:
    with pytest.raises(NotChunked, match="other than a factor and a softcap"):
        ChunkedLoss(build(Squared, llama().config))
    bart = build(BartForCausalLM, BartConfig(vocab_size=97, d_model=32, decoder_layers=1, decoder_attention_heads=2))
    with pytest.raises(NotChunked, match="does not compute its loss from the logits"):
        ChunkedLoss(bart)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": LABELS}
    assert RowLosses(bart)(inputs).shape == (3,)
    with pytest.raises(NotChunked, match="not a model of transformers"):
        ChunkedLoss(nn.Linear(2, 2))
    model = llama()
    reparam.attach(model, "lora", r=2)
    with reparam.select(model, ["default"] * 3), pytest.raises(NotChunked, match="each row of the batch"):
        ChunkedLoss(model)


def test_tails_are_measured() -> None:
    assert ChunkedLoss(MODELS["gemma2"]()).tail == Tail(1.0, 3.0)
    assert ChunkedLoss(MODELS["granite"]()).tail == Tail(0.125)
    assert ChunkedLoss(llama()).tail == Tail()
