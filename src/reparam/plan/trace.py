"""A training step on a model without values: what is live at the peak, and what it is for."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.hf.chunked import LOGITS, TOKENS, ChunkedLoss, Tail
from reparam.plan.hollow import Hollow, head_of, hollow
from reparam.plan.live import Live
from reparam.tasks import find_task
from reparam.train.config import Config
from reparam.train.optimizer import BITS, bytes_of, settings


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes at the peak by what they are for."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())

    def along(self, more: Peak, distance: float) -> Peak:
        """The peak `distance` times as far from this one as `more` is: a straight line through both."""
        names = {**self.parts, **more.parts}
        ours, theirs = self.parts, more.parts
        return Peak({n: round(ours.get(n, 0) + distance * (theirs.get(n, 0) - ours.get(n, 0))) for n in names})


def traced(config: Config, architecture: Any, rows: int, tokens: int, share: float = 1.0) -> Peak:
    """The peak of training steps with `rows` rows of `tokens` tokens each, a share of which carries loss.

    Raises the errors of `hollow`.
    """
    with hollow(config, architecture) as model:
        live = Live(architecture.get_text_config().vocab_size)
        with model.mode:
            live.hold([*model.model.parameters(), *model.model.buffers()], "weights")
            live.hold(model.adapter.parameters(), "adapter")
            with live, warnings.catch_warnings(), _precision(config), _loss(config, model, share) as loss:
                warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # it is only compared
                for _ in _optimizer(config, model, live):
                    loss(*_batch(rows, tokens)).backward()
        parts = {name: size for name, size in live.parts.items() if size > 0}
        parts |= _paged(config, model)
        if torch.cuda.is_available() and model.unpacked:
            parts["unpacked matrix"] = model.unpacked
        return Peak(parts)


def _batch(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids and a mask of rows with padding, for which the model needs a mask of its own."""
    return torch.zeros(rows, tokens, dtype=torch.int64), torch.ones(rows, tokens, dtype=torch.int64)


def _precision(config: Config) -> contextlib.AbstractContextManager[Any]:
    if config.run.precision == "bfloat16":
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _loss(config: Config, model: Hollow, share: float) -> Any:
    """A function from ids and mask to the loss, as training computes it: in chunks of logits where that is set."""
    causal = config.run.task == "causal"
    chunked = _Chunks(model.model, share) if config.run.chunked_loss and causal else contextlib.nullcontext()

    def loss(ids: Tensor, mask: Tensor) -> Tensor:
        if not causal:
            return _loss_of_task(config, model.model, ids, mask)
        return model.model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss

    with chunked:
        yield loss


def _loss_of_task(config: Config, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The loss of a task: an answer has the length of its input, and a row of embeddings two texts."""
    task, head = find_task(config.run.task), head_of(config)
    assert head is not None
    batch, labels = {"input_ids": ids, "attention_mask": mask}, ids
    if config.run.task == "classification":
        labels = ids[:, 0]
    elif config.run.task == "embedding":
        batch = {key: torch.cat([value, value]) for key, value in batch.items()}
        labels = torch.arange(len(ids))
    outputs = task.forward(model, {**batch, "labels": labels}, head)
    if config.run.task in ("classification", "embedding"):
        return task.losses(outputs, labels, config.run.temperature).mean()
    return F.cross_entropy(outputs.flatten(0, 1).float(), labels.flatten())


class _Chunks(ChunkedLoss):
    """The loss in chunks, for tensors without values: the first tokens carry loss, and no softcap is looked for."""

    def __init__(self, model: nn.Module, share: float) -> None:
        self._share = share
        self.outer = self.root = model
        self.head = model.get_output_embeddings()  # type: ignore[operator]
        self.smoothing, self.row_losses, self.tail = 0.0, None, Tail()
        self._passes, self._held = [], contextlib.ExitStack()
        self.vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        self._trained = any(p.requires_grad for p in self.head.parameters())
        self.chunk = max(TOKENS["cpu"], LOGITS // self.vocabulary)

    def _loss(self, logits: Tensor, labels: Tensor, *rest: Any, **more: Any) -> Tensor:
        hidden, self._passes[-1].waiting = self._passes[-1].hidden, False
        assert hidden is not None
        flat, wanted = hidden.reshape(-1, hidden.shape[-1]), F.pad(labels, (0, 1))[..., 1:].reshape(-1)
        places = torch.arange(max(1, round(self._share * len(flat))))
        return self._summed(
            flat.index_select(0, places), wanted.index_select(0, places), places, hidden.shape[:-1]
        ) / len(flat)


def _optimizer(config: Config, model: Hollow, live: Live) -> Any:
    """Yield for a step, and step the optimizer after it. Paged and 8-bit states are counted by `_paged`.

    The optimizer has made a step before, so that it has its states.
    """
    parameters = model.adapter.parameters()
    for parameter in parameters:
        live.gradient(parameter)
        parameter.grad = torch.empty_like(parameter)
    live.hold([p.grad for p in parameters if p.grad is not None], "gradients")
    own = None if config.optim.name in BITS else torch.optim.AdamW(parameters)
    for begun in (False, True):
        if begun:
            yield
        with live.during("optimizer"):
            if own is not None:
                own.step()
            for parameter in parameters:
                parameter.grad = None


def _paged(config: Config, model: Hollow) -> dict[str, int]:
    """Bytes of the states of reparam's optimizers that are on the device at once."""
    if config.optim.name not in BITS:
        return {}
    given = settings(config.optim, folder=None)
    each = 8 if given["bits"] == 32 else 2
    count = sum(p.numel() for p in model.adapter.parameters())
    states, pages = each * count, 2 * bytes_of("page", config.optim.page)
    return {"optimizer": min(states, max(given["budget"] or states, pages))}
