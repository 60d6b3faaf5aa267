"""Read the rows of a file as questions: what stands before the answer, which may be absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reparam.data.files import objects
from reparam.data.formats import read_row
from reparam.data.formats.format import chat_row
from reparam.data.messages import Messages, string_problem
from reparam.data.row import Row
from reparam.errors import DataError

OTHERS = ("messages", "conversations", "text")  # keys of formats without a key for the question


class Question(NamedTuple):
    """What a model is asked."""

    source: str
    """Where it stands, as "file:line" or "file:row"."""
    asked: str | Messages
    """A text to continue, or the messages of a chat up to where the answer begins."""
    prompt: bool
    """Whether it is a single prompt without an answer, which is asked as prompts on the command line are."""
    expected: str | None
    """The answer in the file; None if there is none."""
    variables: Mapping[str, Any]
    """Further variables of the chat template, such as `tools`."""
    columns: Mapping[str, Any]
    """All other keys of the row."""

    def as_json(self) -> dict[str, Any]:
        """The question as an object of a JSONL file, with the answer in the file as "expected"."""
        key = "prompt" if isinstance(self.asked, str) else "messages"
        found = {**self.columns, key: self.asked if isinstance(self.asked, str) else list(self.asked)}
        return found if self.expected is None else {**found, "expected": self.expected}


def read_questions(source: str | Path, columns: Mapping[str, str] | None = None) -> list[Question]:
    """Read all questions of a file, or of whatever else `reparam.data.rows.read_rows` reads, with the same `columns`.

    A row has a format of training rows, or is a {"prompt": ...} or {"instruction": ...} without an answer. The question
    of a chat is all that stands before its last message, if that is an answer, and otherwise the whole chat; that of a
    text is the text. Raises DataError with all problems.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "rows.jsonl"
    >>> _ = file.write_text('{"prompt": "2 + 2 ="}\\n{"prompt": "3 + 3 =", "completion": " 6"}')
    >>> [(question.asked, question.expected) for question in read_questions(file)]
    [('2 + 2 =', None), ('3 + 3 =', ' 6')]
    """
    found: list[Question] = []
    problems: list[str] = []
    for place, value in objects(source):
        try:
            if isinstance(value, DataError):
                raise value
            found.append(_question(value, place, columns or {}))
        except DataError as error:
            problems.extend(error.problems)
    if not found and not problems:
        problems.append(f'{source}: the file is empty; expected rows such as {{"prompt": "2 + 2 ="}}')
    if problems:
        raise DataError(problems)
    return found


def _question(value: Mapping[str, Any], place: str, columns: Mapping[str, str]) -> Question:
    prompt, answered = columns.get("prompt", "prompt"), {columns.get("completion", "completion"), *OTHERS}
    if isinstance(value.get(prompt), str | list) and not answered & value.keys():
        return _alone(value, prompt, place)
    if "instruction" in value and "output" not in value and not columns:
        value = {**value, "output": ""}
    row = read_row(value, place, columns)
    match row.kind:
        case "completion":
            return _made(row, row.prompt, row.completion)
        case "text":
            return _made(row, row.text, None)
    *before, last = row.messages
    if last["role"] != "assistant":
        return _made(row, row.messages, None)
    if not before:
        raise DataError([f"{place}: nothing stands before the answer, so there is no question"])
    return _made(row, before, last["content"] or None)


def _alone(value: Mapping[str, Any], key: str, place: str) -> Question:
    """A prompt without an answer: a text, or the messages of a chat."""
    others = {name: held for name, held in value.items() if name != key}
    asked = value[key]
    if isinstance(asked, list):
        row = chat_row(asked, others, place)
        return _made(row, row.messages, None)
    if problem := string_problem(asked, f'{place}: "{key}"'):
        raise DataError([problem])
    return Question(place, asked, True, None, {}, others)


def _made(row: Row, asked: str | Messages, expected: str | None) -> Question:
    return Question(row.source, asked, False, expected, row.variables, row.columns)
