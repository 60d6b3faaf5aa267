"""The loss of a causal language model without its logits: the output head is applied to a few tokens at a time.

The logits of all tokens, [B, T, V], are the largest tensor of most runs. While `ChunkedLoss` is entered, a forward pass
with labels keeps the head's input, and computes logits only for tokens that carry loss, a chunk at a time. The rest of
the forward pass is the model's own: it calls `loss_function`, and adds what else belongs to its loss, such as that of a
router.

Shapes: B rows, T tokens of a row, N tokens that carry loss, H width of the hidden states, V entries of the vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from reparam.adapter.selection import select, state_of
from reparam.errors import NotChunked
from reparam.sites.wrapped import bare

LOGITS = 2**22
"""Logits in a chunk, 16 MiB in float32, where a chunk then has at least `TOKENS` tokens."""
TOKENS = {"cpu": 128}
"""The fewest tokens in a chunk by type of device: products of fewer rows are slower."""
_OTHER = 1024  # on other devices
_FAR = 1e6  # a logit at which every softcap is saturated


@dataclasses.dataclass(frozen=True)
class Tail:
    """What a model does to its logits after the head: cap * tanh(scale * z / cap), or scale * z."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply it to logits of any shape, in their dtype."""
        scaled = logits if self.scale == 1 else logits * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


class ChunkedLoss:
    """A context in which `model(..., labels=labels).loss` is computed in chunks. It can be entered again.

    The loss and its gradients equal those of the model's own forward pass up to rounding. With labels, `logits` of the
    output are empty, [B, 0, V]; forward passes without labels are not changed.

    Args:
        model: a causal language model of transformers, with or without adapters; adapters are attached before.
        smoothing: weight, from 0 to 1, of the mean over the vocabulary in the targets (label smoothing).
        chunk: number of tokens whose logits are computed at a time. By default 2**22 logits, but at least the logits of
            128 tokens on a CPU, and of 1024 on other devices.

    Attributes:
        row_losses: after a forward pass without gradients, the summed loss of each row, [B] float32.

    Raises:
        NotChunked: the model does not compute its loss from the logits of one output head.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    >>> model, ids = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), torch.arange(12).view(2, 6)
    >>> stock = model(input_ids=ids, labels=ids).loss
    >>> with ChunkedLoss(model, chunk=4):
    ...     found = model(input_ids=ids, labels=ids).loss
    >>> torch.allclose(found, stock)
    True
    """

    def __init__(self, model: nn.Module, *, smoothing: float = 0.0, chunk: int | None = None) -> None:
        self.outer, self.root = bare(model), _language_model(model)
        self.head: nn.Module = self.root.get_output_embeddings()
        self.smoothing = smoothing
        self.row_losses: Tensor | None = None
        self._passes: list[_Pass] = []  # the forward passes that are running, each inside the one before
        self._held = contextlib.ExitStack()
        self._check(model)
        self.tail, hidden = self._measured(model)
        training = self.head.training
        with torch.enable_grad():
            logits = self.head.eval()(hidden)
        self.head.train(training)
        self.vocabulary, self._trained = logits.shape[-1], logits.requires_grad
        self.chunk = chunk or max(TOKENS.get(hidden.device.type, _OTHER), LOGITS // self.vocabulary)

    def __enter__(self) -> Self:
        self._held = _installed(self.root, self.head, self._instead_of_head, self._loss)
        begin = self.outer.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._held.callback(begin.remove)
        self._held.callback(self.outer.register_forward_hook(self._end, always_call=True).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    # ---- what the model calls

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._passes.append(_Pass(waiting=kwargs.get("labels") is not None))

    def _end(self, *parts: Any) -> None:
        self._passes.pop()

    def _instead_of_head(self, hidden: Tensor) -> Tensor:
        if not self._passes or not self._passes[-1].waiting:
            return _own_forward(self.head)(hidden)
        self._passes[-1].hidden = hidden
        return hidden.new_zeros(len(hidden), 0, self.vocabulary)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As `ForCausalLMLoss` of transformers, from the head's input in place of the logits."""
        hidden, self._passes[-1].waiting = self._passes[-1].hidden, False
        assert hidden is not None, "the model has called its loss function without its head"
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        wanted = shift_labels.to(hidden.device).reshape(-1)
        places = (wanted != ignore_index).nonzero().squeeze(1)  # [N]
        chosen, wanted = hidden.reshape(-1, hidden.shape[-1]).index_select(0, places), wanted[places]
        total = self._summed(chosen, wanted, places, hidden.shape[:-1])
        count = len(places) if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else max(count, 1))

    # ---- the loss

    def _summed(self, hidden: Tensor, wanted: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
        """The summed loss of the chosen tokens, hidden [N, H] and wanted [N], a scalar of float32."""
        size = self.chunk
        if not torch.is_grad_enabled():
            parts = [self._of_tokens(h, w) for h, w in _pieces(size, hidden, wanted)]
            losses = torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
            self.row_losses = losses.new_zeros(shape.numel()).index_copy_(0, places, losses).view(shape).sum(-1)
            return losses.sum()
        if len(hidden) == 0:
            return hidden.sum().float()  # zero, and a part of the graph
        if self._trained:
            sums = [checkpoint(self._sum, h, w, use_reentrant=False) for h, w in _pieces(size, hidden, wanted)]
            return torch.stack(sums).sum()
        found: Tensor = _Frozen.apply(hidden, wanted, self._sum, size)
        return found

    def _sum(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        return self._of_tokens(hidden, wanted).sum()

    def _of_tokens(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """The cross entropy of each token, hidden [n, H] and wanted [n], in nats, [n] float32."""
        logits = self.tail(self.head(hidden)).float()
        return F.cross_entropy(logits, wanted, reduction="none", label_smoothing=self.smoothing)

    # ---- what kind of model it is

    def _check(self, model: nn.Module) -> None:
        if self.head is None or "forward" in vars(self.head):  # set by a device map
            raise NotChunked("the model has no output head that is called in one place")
        if self.root.loss_function is not ForCausalLMLoss:
            raise NotChunked(f"the model has a loss function of its own ({self.root.loss_function.__name__})")
        if not hasattr(bare(model), "reparam_state"):
            return
        state = state_of(model)
        if not isinstance(state.choice, str | None):
            raise NotChunked("each row of the batch has an adapter of its own")
        modules = {id(module): name for name, module in bare(model).named_modules()}
        head = modules.get(id(self.head))
        for adapter in state.adapters.values():
            if adapter.method.takes_context and head in (*adapter.sites, *adapter.tied):
                raise NotChunked("the output head is adapted, and its update depends on the rows of the batch")

    def _measured(self, model: nn.Module) -> tuple[Tail, Tensor]:
        """Find out, in a forward pass of two tokens, what the model does to its logits. Returns it and a hidden state.

        Known values take the place of the logits, so that what comes out shows the function.
        """
        given, found, states = torch.empty(0), list[Tensor](), list[Tensor]()

        def instead_of_head(hidden: Tensor) -> Tensor:
            nonlocal given
            states.append(hidden[:, -1])
            given = torch.linspace(-80, 80, _own_forward(self.head)(states[0]).shape[-1], device=hidden.device)
            given[0], given[-1] = 1.0, _FAR
            return given.expand(*hidden.shape[:-1], -1)

        def loss(logits: Tensor, labels: Tensor, *rest: Any, **more: Any) -> Tensor:
            if logits.shape == (*labels.shape, len(given)):
                found.append(logits[0, -1].float())
            return logits.new_zeros(())

        ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        training = model.training
        nothing = select(model, None) if hasattr(bare(model), "reparam_state") else contextlib.nullcontext()
        with nothing, torch.no_grad(), _installed(self.root, self.head, instead_of_head, loss):
            try:
                model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
            except (RuntimeError, ValueError, TypeError, IndexError):
                found.clear()
            finally:
                model.train(training)
        if len(found) != 1 or len(states) != 1:
            raise NotChunked("the model does not compute its loss from the logits of one output head")
        return _fitted(given, found[0]), states[0]


class RowLosses:
    """Computes the summed loss of each row of a batch, in chunks where `ChunkedLoss` can."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        try:
            self._chunked: ChunkedLoss | None = ChunkedLoss(model)
        except NotChunked:
            self._chunked = None

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """The summed cross entropy in nats of each row, [B] float32; `inputs` are the model's, with labels [B, T]."""
        if self._chunked is not None:
            with self._chunked as losses:
                self.model(**inputs)
            assert losses.row_losses is not None
            return losses.row_losses
        labels = inputs["labels"][:, 1:]
        logits = self.model(**{key: value for key, value in inputs.items() if key != "labels"}).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).sum(1)


@dataclasses.dataclass
class _Pass:
    """A forward pass: whether it has labels and its loss is still to be computed, and the head's input."""

    waiting: bool
    hidden: Tensor | None = None


class _Frozen(torch.autograd.Function):
    """The sum of a loss over tokens whose gradient goes to the hidden states alone, computed chunk by chunk.

    The forward pass computes the gradient too, so that no logits are kept and none are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, wanted: Tensor, loss: Callable[..., Tensor], size: int) -> Tensor:
        """hidden [N, H], wanted [N] -> a scalar of float32."""
        grads: list[Tensor] = []
        total = torch.zeros((), device=hidden.device)
        for h, w in _pieces(size, hidden, wanted):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                part = loss(h, w)
                grads += torch.autograd.grad(part, h) if ctx.needs_input_grad[0] else ()
            total += part.detach()
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients of the forward pass, scaled."""
        return torch.cat([(g.float() * grad).to(g.dtype) for g in ctx.saved_tensors]), None, None, None


def _pieces(size: int, hidden: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(hidden.split(size), wanted.split(size), strict=True) if len(hidden) else ()


def _fitted(given: Tensor, found: Tensor) -> Tail:
    """The tail that maps the given logits to those that were found. Raises NotChunked if there is none."""
    one, far = float(found[0]), float(found[-1])  # the values of 1 and of _FAR
    tails = [Tail(one)]
    if 0 < one < far < _FAR:  # cap * tanh(scale / cap) is `one`, and the cap is `far`
        tails.append(Tail(round(far * math.atanh(one / far), 6), far))
    for tail in tails:
        if torch.allclose(tail(given), found, rtol=1e-4, atol=1e-4):
            return tail
    raise NotChunked("the model changes its logits in a way other than a factor and a softcap")


def _language_model(model: nn.Module) -> Any:
    """The model of transformers, inside wrappers and prompts."""
    inner: Any = bare(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if not isinstance(inner, PreTrainedModel):
        raise NotChunked(f"{type(inner).__name__} is not a model of transformers")
    return inner


def _installed(
    root: Any, head: nn.Module, instead: Callable[[Tensor], Tensor], loss: Callable[..., Tensor]
) -> contextlib.ExitStack:
    """Put a function in the place of the head's forward, and one in that of the loss, until the stack is closed."""
    held = contextlib.ExitStack()
    head.forward = instead  # an attribute of the module, which hides that of its class
    held.callback(vars(head).pop, "forward")
    root.loss_function = loss
    held.callback(vars(root).pop, "_loss_function")
    return held


def _own_forward(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward of the head's class."""
    found: Callable[[Tensor], Tensor] = type(head).forward.__get__(head)
    return found
