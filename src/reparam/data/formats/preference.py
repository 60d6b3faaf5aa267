"""Preferences: two answers to one prompt, of which one was chosen, and single answers with a label.

Pairs are in the forms of TRL, of OpenAI's preference data, and of LLaMA-Factory's ranking data:

    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}             strings, or lists of messages
    {"chosen": [...], "rejected": [...]}                                the prompt is what both begin with
    {"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}
    {"conversations": [...], "chosen": {...}, "rejected": {...}}        or "messages"; one message each
    {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}

Judged answers are rows of the other formats with "label" (or "kto_tag"), which is true for a good answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from reparam.data.formats import alpaca, read_row, renamed
from reparam.data.formats.format import chat_row, check_strings, read_json, without_loss
from reparam.data.formats.sharegpt import message_of
from reparam.data.messages import near_key
from reparam.data.row import Row
from reparam.errors import DataError

LABELS = ("label", "kto_tag")
GOOD = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
SAME = '{}: "chosen" and "rejected" are the same, so the row prefers nothing; remove it'
PAIR = '"chosen" and "rejected"'


def read_pair(value: Mapping[str, Any], source: str, columns: Mapping[str, str] | None = None) -> tuple[Row, Row]:
    """The chosen and the rejected answer of an object of a file, each as a row with the prompt.

    `source` says where the object stands, and `columns` under which of its keys those of the format are. Raises
    DataError, with all problems, for an object of another form, and if the two answers are the same.

    >>> chosen, rejected = read_pair({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "rows.jsonl:1")
    >>> chosen.prompt, chosen.completion, rejected.completion, chosen.source
    ('2 + 2 =', ' 4', ' 5', 'rows.jsonl:1 (chosen)')
    """
    given = _as_pair(renamed(value, source, columns or {}))
    lacks = [key for key in ("chosen", "rejected") if given.get(key) is None]
    if lacks:
        raise DataError([f"{source}: {_why_no_pair(given, lacks)}"])
    chosen, rejected = given.pop("chosen"), given.pop("rejected")
    if "prompt" not in given and not {"instruction", "conversations", "messages"} & given.keys():
        given["prompt"], chosen, rejected = _divided(chosen, rejected, source)
    rows = _row(given, chosen, f"{source} (chosen)"), _row(given, rejected, f"{source} (rejected)")
    if _content(rows[0]) == _content(rows[1]):
        raise DataError([SAME.format(source)])
    return rows


def read_judged(
    value: Mapping[str, Any], source: str, columns: Mapping[str, str] | None = None
) -> list[tuple[Row, bool]]:
    """The answers of an object of a file, each with whether it is good: one with a label, or the two of a pair.

    `source`, `columns` and the errors are those of `read_pair`.

    >>> [(row, good)] = read_judged({"prompt": "2 + 2 =", "completion": " 5", "label": False}, "rows.jsonl:1")
    >>> row.completion, good
    (' 5', False)
    """
    columns = columns or {}
    given = renamed(value, source, columns)
    if _as_pair(given).keys() >= {"chosen", "rejected"}:
        chosen, rejected = read_pair(value, source, columns)
        return [(chosen, True), (rejected, False)]
    labels = [key for key in LABELS if given.get(key) is not None]
    if not labels:
        hint = near_key(given, LABELS[:1])
        raise DataError([f'{source}: expected an answer with "label" (true if it is good), or {PAIR}{hint}'])
    label = given.pop(labels[0])
    good = GOOD.get(label.strip().lower() if isinstance(label, str) else label) if not _is_table(label) else None
    if good is None:
        raise DataError([f'{source}: "{labels[0]}" must be true or false, got {label!r}'])
    rest = {key: key for key in columns if key not in LABELS}
    return [(read_row(given, source, rest), good)]


def _is_table(value: object) -> bool:
    return isinstance(value, list | dict)


def _as_pair(given: dict[str, Any]) -> dict[str, Any]:
    """The object with the keys of TRL in place of OpenAI's."""
    asked = read_json(given.get("input"))
    if not (isinstance(asked, dict) and {"preferred_output", "non_preferred_output"} <= given.keys()):
        return given
    rest = {
        key: held for key, held in given.items() if key not in ("input", "preferred_output", "non_preferred_output")
    }
    return {**rest, **asked, "chosen": given["preferred_output"], "rejected": given["non_preferred_output"]}


def _why_no_pair(given: Mapping[str, Any], lacks: list[str]) -> str:
    if len(lacks) == 1:
        return f'"{lacks[0]}" is missing; a preference has {PAIR}{near_key(given, lacks)}'
    has = ", ".join(f'"{key}"' for key in list(given)[:6]) or "no keys"
    if any(key in given for key in LABELS):
        return f"expected {PAIR}; the row has {has}: train on answers with a label with --objective kto"
    return f"expected {PAIR}; the row has {has}{near_key(given, lacks) if given else ''}"


def _row(given: Mapping[str, Any], answer: object, source: str) -> Row:
    """The prompt with one of the answers."""
    rest = dict(given)
    turns = _messages(answer)
    if "instruction" in rest:
        return _alpaca(rest, answer, source)
    for key in ("conversations", "messages"):
        if key in rest:
            earlier = _messages(rest.pop(key))
            if earlier is None:
                raise DataError([f'{source}: "{key}" must be a list of messages'])
            return chat_row([*without_loss(earlier), *_answered(turns, answer)], rest, source)
    prompt = rest.pop("prompt")
    earlier = _messages(prompt)
    if earlier is not None:
        return chat_row([*without_loss(earlier), *_answered(turns, answer)], rest, source)
    if turns is not None:
        begins = turns[0].get("content") if turns[0].get("role") == "user" else None
        question = [] if begins == prompt else [{"role": "user", "content": prompt}]
        return chat_row([*question, *turns], rest, source)
    check_strings({"prompt": prompt, "answer": answer}, ("prompt", "answer"), source)
    assert isinstance(answer, str)
    return Row("completion", source, prompt=prompt, completion=answer, columns=rest)


def _alpaca(rest: dict[str, Any], answer: object, source: str) -> Row:
    row = alpaca.FORMAT.read({**rest, "output": answer}, source)
    return Row(
        "chat",
        source,
        messages=(*without_loss(row.messages[:-1]), row.messages[-1]),
        variables=row.variables,
        columns=row.columns,
    )


def _answered(turns: list[dict[str, Any]] | None, answer: object) -> list[dict[str, Any]]:
    return turns if turns is not None else [{"role": "assistant", "content": answer}]


def _messages(value: object) -> list[dict[str, Any]] | None:
    """The messages that a value holds, also as JSON or as a single message; None for anything else."""
    if isinstance(value, str):
        value = read_json(value) if value.lstrip()[:1] in ("[", "{") else None
    turns = [value] if isinstance(value, dict) else value
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(t, dict) and {"role", "from"} & t.keys() for t in turns)
    ):
        return None
    return [message_of(turn, "a message") for turn in turns]


def _divided(chosen: object, rejected: object, source: str) -> tuple[Any, Any, Any]:
    """What both answers begin with, and the rest of each; as TRL divides them."""
    first, second = _messages(chosen), _messages(rejected)
    if chosen == rejected:
        raise DataError([SAME.format(source)])
    if first is not None and second is not None:
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))
        if same == 0 or same == min(len(first), len(second)):
            what = "begin with different messages" if same == 0 else "do not both end with an answer of their own"
            raise DataError([f'{source}: without "prompt", {PAIR} must begin with the same messages; they {what}'])
        return first[:same], first[same:], second[same:]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise DataError([f"{source}: {PAIR} must both be strings, or both lists of messages"])
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    same -= chosen[same - 1 : same] == " "  # a space belongs to the word that follows it
    if same <= 0:
        raise DataError([f'{source}: no "prompt", and {PAIR} begin differently; add "prompt"'])
    return chosen[:same], chosen[same:], rejected[same:]


def _content(row: Row) -> object:
    return row.messages or row.completion
