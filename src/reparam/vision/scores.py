"""Scores of a model that sees: the loss of rows with images and of text alone, and exact matches of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.core.progress import tracked
from reparam.data.row import Row
from reparam.evaluation.score import Answer, Score, loss_score, score_answers
from reparam.images.places import MARK
from reparam.images.rows import Images
from reparam.vision.model import VoRA
from reparam.vision.rows import Seen, collator

LOSS, SEEN, TEXT = "loss per token", "loss per token with images", "loss per token of text alone"


def scored(
    vora: VoRA, rows: Seen, held_out: Sequence[Row], *, batch: int, answers: int
) -> tuple[tuple[Score, ...], list[Answer]]:
    """The mean losses of the rows in nats, and exact matches of answers to the first `answers` of `held_out`.

    If there are rows with images and rows without, each kind also has a loss of its own.
    """
    nats, tokens = token_losses(vora, rows, batch=batch)
    seen = torch.tensor([count > 0 for count in rows.counts])
    found = [loss_score(LOSS, nats, tokens)]
    if bool(seen.any()) and not bool(seen.all()):
        found += [loss_score(name, nats[kind], tokens[kind]) for name, kind in ((SEEN, seen), (TEXT, ~seen))]
    given = answered(vora, held_out[:answers], rows.images, batch=batch)
    return (*found, *([score_answers(given)] if given else [])), given


@torch.no_grad()
def token_losses(vora: VoRA, rows: Seen, *, batch: int) -> tuple[Tensor, Tensor]:
    """The summed cross entropy in nats and the number of loss tokens of each example, both [E] float64."""
    collate, device = collator(rows.fill), vora.device
    nats, tokens = (torch.zeros(len(rows), dtype=torch.float64) for _ in range(2))
    training = vora.training
    vora.eval()
    order = torch.argsort(rows.encoded.lengths).tolist()
    for start in tracked(range(0, len(order), batch), "scoring held-out rows", unit="batches"):
        given: dict[str, Any] = collate([rows[i] for i in order[start : start + batch]])
        numbers, labels = given.pop("row"), given.pop("labels")[:, 1:].to(device)
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()}
        logits = vora(**inputs).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        nats[numbers] = losses.sum(1).double().cpu()
        tokens[numbers] = (labels != -100).sum(1).double().cpu()
    vora.train(training)
    return nats, tokens


def answered(vora: VoRA, rows: Sequence[Row], images: Mapping[str, Images], *, batch: int) -> list[Answer]:
    """Greedy answers to completions with a prompt, and to the last turn of chats that end with an answer."""
    asked: list[tuple[Row, Any, str]] = []
    for row in rows:
        if row.kind == "completion" and row.prompt:
            asked.append((row, row.prompt, row.completion))
        elif row.kind == "chat" and len(row.messages) > 1 and row.messages[-1]["role"] == "assistant":
            asked.append((row, list(row.messages[:-1]), str(row.messages[-1]["content"])))
    found: list[Answer] = []
    assert vora.processor is not None
    longest = max((len(vora.processor.tokenizer(expected)["input_ids"]) for _, _, expected in asked), default=0)
    for start in tracked(range(0, len(asked), batch), "generating answers", unit="batches"):
        chosen = asked[start : start + batch]
        prompts = [prompt for _, prompt, _ in chosen]
        sources: list[Any] = [
            list(images[row.source].sources) if row.source in images else None for row, _, _ in chosen
        ]
        given = vora.generate(prompts, sources, raw=True, max_new_tokens=longest + 8)
        for (row, prompt, expected), text in zip(chosen, given, strict=True):
            question = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
            found.append(Answer(row.source, question.replace(MARK, f"{MARK} ").strip(), expected, text))
    return found
