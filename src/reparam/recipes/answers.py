"""Answer a file of prompts, and write a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from reparam.core.text import counted
from reparam.data.questions import Question
from reparam.evaluation.terminal import say
from reparam.io.outputs import OVERWRITE, check_writable
from reparam.io.staged import write_file
from reparam.recipes.chat import Chat


def check_output(file: Path, *, overwrite: bool) -> None:
    """Raise ValueError for a folder and, unless `overwrite` is set, for a file; WriteFailed if it cannot be made."""
    if file.is_dir():
        raise ValueError(f"{file}: is a folder; give a file for the answers, such as {file / 'answers.jsonl'}")
    if file.exists() and not overwrite:
        raise ValueError(f"{file}: exists; give a new file, or replace it with {OVERWRITE}")
    check_writable(file)


def write_answers(
    chat: Chat,
    questions: Sequence[Question],
    file: Path | None,
    *,
    batch: int,
    console: Console,
    engine: bool = False,
) -> None:
    """Write one object for each question, in order: to `file` at once when all are answered, or to the console.

    An object has the keys of the row, without its answer; `expected`, if the row has an answer; and `answer` or, with
    several who answer, `answers` by their labels. With `engine`, the serving engine answers. Raises DataError for
    questions that cannot be asked.
    """
    lines = []
    for question, answers in zip(questions, chat.answers(questions, batch=batch, engine=engine), strict=True):
        given = {"answer": next(iter(answers.values()))} if len(answers) == 1 else {"answers": answers}
        lines.append({**question.as_json(), **given})
    if file is None:
        for line in lines:
            say(console, json.dumps(line))
        return
    write_file(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    say(console, f"{counted(len(lines), 'answer')} in {file}")
