"""Write the embedded tasks as JSON lines, made from the running Python's standard library.

    python scripts/make_tasks.py assets/tasks                        # the two committed tasks: signatures and reference
    python scripts/make_tasks.py out --task defaults --task count    # sibling tasks over the same signatures

A task over signatures is a table of chats: the question is a function's signature, the answer follows from its syntax
tree (`docstring` alone looks beyond the signature). The question does not say which task it belongs to, so the tasks
contradict each other on purpose. Files that `stdlib_text.held_out` keeps for evaluation give `valid` and `test`, all
others `train`. A signature stands on one side only, and on an evaluation side only if no file that pre-training read
contains it. How large a part of a file one answer may be is bounded (`Task.most`), so that giving the same answer
always does not score well.

`reference` is plain text: the language reference in `pydoc_data.topics`, cut at paragraphs and split by topic.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as language_reference
from typing import Any

from stdlib_text import files, held_out

Row = dict[str, Any]
SIZES = {"train": 5000, "valid": 200, "test": 400}  # most rows in a file of a task over signatures
MOST = 0.02  # largest share of one list of argument names
LONGEST = 260  # characters of signature and argument names together, about 128 tokens of the embedded model at most
PIECE = 1500  # characters in one piece of the language reference
SHARED = 60  # a paragraph of the reference from this many characters on is kept in one topic only


@dataclass(frozen=True)
class Function:
    """One function of the standard library."""

    signature: str  # on one line, as ast.unparse writes it: "def read(self, size=-1) -> bytes:"
    node: ast.FunctionDef | ast.AsyncFunctionDef  # its syntax tree
    source: str  # "path.py:LINE", the path relative to the standard library


@dataclass(frozen=True)
class Task:
    """How a task over signatures gets its answers."""

    answer: Callable[[Function], str | None]  # None: this function has none, and gives no row
    most: float  # the largest share of a file's rows that one answer may take


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The function's head as one line of source, without decorators and body."""
    head = copy.copy(node)
    head.body, head.decorator_list = [ast.Pass()], []
    return ast.unparse(head).rsplit("\n", 1)[0]


def functions(sources: Iterable[tuple[str, str]]) -> Iterator[Function]:
    """Every function that takes arguments in `sources`, which are (path, text); what does not parse is skipped."""
    for path, text in sources:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # test files with deprecated escapes
                tree = ast.parse(text)
        except (SyntaxError, ValueError):  # test files that are broken on purpose, or of Python 2
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and arguments(node):
                yield Function(signature(node), node, f"{path}:{node.lineno}")


def side(path: str) -> str:
    """The split that the file at `path` belongs to; a held-out one goes by the second byte of its hash."""
    if not held_out(path):
        return "train"
    return "valid" if hashlib.sha256(path.encode()).digest()[1] < 85 else "test"


def rank(function: Function, seed: str) -> bytes:
    """A key to sort by: an order drawn with `seed`, in which no function moves when another comes or goes."""
    return hashlib.sha256(f"{seed} {function.signature}".encode()).digest()


def split(found: Iterable[Function], *, seed: int) -> dict[str, list[Function]]:
    """The functions to choose from by side: distinct signatures, in an order drawn with `seed`.

    One that stands in several files belongs to `train` before `test` before `valid`. Long ones are left out, but
    only after that, so that the length has no say in where a signature belongs. More than half of all functions
    take `self` alone; no list of names is more than MOST of a side.
    """
    sides: dict[str, dict[str, Function]] = {"train": {}, "test": {}, "valid": {}}
    for function in found:
        sides[side(function.source.rsplit(":", 1)[0])].setdefault(function.signature, function)
    seen: set[str] = set()
    result = {}
    for name, distinct in sides.items():
        short = [f for s, f in distinct.items() if s not in seen and len(s) + len(names(f)) <= LONGEST]
        seen |= distinct.keys()
        short.sort(key=lambda f: rank(f, f"{seed} choose"))
        chosen = [f for f, _ in thin([(f, names(f)) for f in short], size=len(short), most=MOST)]
        result[name] = sorted(chosen, key=lambda f: rank(f, f"{seed}"))
    return result


def thin(answered: list[tuple[Function, str]], *, size: int, most: float) -> list[tuple[Function, str]]:
    """The first `size` pairs of function and answer, or fewer where no answer could keep to the share `most`."""
    counts = Counter(answer for _, answer in answered)
    while True:
        largest = max(1, int(most * size))
        possible = sum(min(n, largest) for n in counts.values())
        if possible >= size:
            break
        size = possible
    taken: Counter[str] = Counter()
    kept: list[tuple[Function, str]] = []
    for function, answer in answered:
        if taken[answer] < largest and len(kept) < size:
            taken[answer] += 1
            kept.append((function, answer))
    return kept


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[tuple[ast.arg, ast.expr | None]]:
    """The arguments in the order of the source, each with its default."""
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [*[None] * (len(positional) - len(a.defaults)), *a.defaults]
    pairs = list(zip(positional, defaults, strict=True))
    pairs += [(a.vararg, None)] if a.vararg else []
    pairs += list(zip(a.kwonlyargs, a.kw_defaults, strict=True))
    return pairs + ([(a.kwarg, None)] if a.kwarg else [])


def names(function: Function) -> str:
    """The arguments' names without stars, defaults and annotations: "self, size, strict"."""
    return ", ".join(arg.arg for arg, _ in arguments(function.node))


def default_values(function: Function) -> str:
    """The source of the default values, in order, or "none"."""
    return ", ".join(ast.unparse(default) for _, default in arguments(function.node) if default) or "none"


def annotation_values(function: Function) -> str:
    """The source of the arguments' annotations, in order, then "-> " and that of the result, or "none"."""
    found = [ast.unparse(arg.annotation) for arg, _ in arguments(function.node) if arg.annotation]
    if function.node.returns:
        found.append("-> " + ast.unparse(function.node.returns))
    return ", ".join(found) or "none"


def call_form(function: Function) -> str:
    """A call that passes every argument on under its own name: "read(self, size=size, strict=strict)".

    An argument with a default goes by keyword, unless it is positional-only or stands before `*args`.
    """
    a = function.node.args
    by_position = a.posonlyargs + a.args if a.vararg else a.posonlyargs
    parts = []
    for arg, default in arguments(function.node):
        stars = "*" if arg is a.vararg else "**" if arg is a.kwarg else ""
        keyword = arg in a.kwonlyargs or (default is not None and arg not in by_position)
        parts.append(f"{arg.arg}={arg.arg}" if keyword else stars + arg.arg)
    return f"{function.node.name}({', '.join(parts)})"


def count(function: Function) -> str:
    """How many arguments there are, `self` included."""
    return str(len(arguments(function.node)))


def first_word(function: Function) -> str | None:
    """The first word of the docstring; None without one, or when it does not start with a letter."""
    word = re.match(r"[A-Za-z]+", ast.get_docstring(function.node) or "")
    return word[0] if word else None


def camel_case(function: Function) -> str | None:
    """The function's name from snake_case to CamelCase: `_read_all` is "ReadAll"; None for underscores only."""
    return "".join(part[0].upper() + part[1:] for part in function.node.name.split("_") if part) or None


TASKS = {
    "signatures": Task(names, most=MOST),
    "defaults": Task(default_values, most=0.5),
    "annotations": Task(annotation_values, most=0.5),
    "call": Task(call_form, most=0.02),
    "count": Task(count, most=0.5),
    "docstring": Task(first_word, most=0.25),
    "camel": Task(camel_case, most=0.02),
}
COMMITTED = ("signatures", "reference")


def chats(name: str, pool: list[Function], *, size: int) -> list[Row]:
    """At most `size` rows of the task `name` over the functions in `pool` that have an answer."""
    task = TASKS[name]
    answered = [(f, answer) for f in pool if (answer := task.answer(f)) is not None]
    chosen = thin(answered, size=size, most=task.most)
    rows: list[Row] = []
    for function, answer in sorted(chosen, key=lambda pair: rank(pair[0], name)):  # thin takes frequent answers early
        messages = [{"role": "user", "content": function.signature}, {"role": "assistant", "content": answer}]
        rows.append({"task": name, "messages": messages, "source": function.source})
    return rows


def own_paragraphs(topics: Mapping[str, str]) -> dict[str, list[str]]:
    """The paragraphs of every topic, without those that a longer topic holds as well.

    The topics overlap ("if" is a section of "compound"); one that is mostly part of longer ones is left out.
    """
    seen: set[str] = set()
    result = {}
    for topic in sorted(topics, key=lambda t: (-len(topics[t]), t)):
        paragraphs = topics[topic].strip("\n").split("\n\n")
        keys = [" ".join(p.split()) for p in paragraphs]
        own = [p for p, key in zip(paragraphs, keys, strict=True) if len(key) < SHARED or key not in seen]
        if sum(map(len, own)) > 0.5 * sum(map(len, paragraphs)):
            result[topic] = own
            seen.update(keys)
    return dict(sorted(result.items()))


def cut(paragraphs: list[str]) -> list[str]:
    """The paragraphs joined to pieces of at most PIECE characters; a paragraph beyond that is cut between lines."""
    parts = []  # (what stands before the part inside a piece, the part)
    for paragraph in paragraphs:
        lines = paragraph.split("\n") if len(paragraph) > PIECE else [paragraph]
        parts += [("\n" if i else "\n\n", line) for i, line in enumerate(lines)]
    pieces: list[str] = []
    for between, part in parts:
        if pieces and len(pieces[-1]) + len(between) + len(part) <= PIECE:
            pieces[-1] += between + part
        else:
            pieces.append(part)
    return pieces


def reference(topics: Mapping[str, str]) -> dict[str, list[Row]]:
    """Rows of the `reference` task by side; `valid` and `test` get a tenth of the text each, in whole topics.

    Topics come in the order of their hash and go to the emptier of the two. One that does not fit is for `train`,
    and so is one of more than a third of a tenth: `valid` and `test` have several topics each.
    """
    kept = own_paragraphs(topics)
    sizes = {topic: sum(map(len, paragraphs)) for topic, paragraphs in kept.items()}
    tenth = sum(sizes.values()) / 10
    sides: dict[str, list[Row]] = {"train": [], "valid": [], "test": []}
    held = {"valid": 0, "test": 0}  # characters
    for topic in sorted(kept, key=lambda t: hashlib.sha256(t.encode()).digest()):
        name = min(held, key=held.__getitem__)
        if sizes[topic] > min(tenth / 3, tenth - held[name]):
            name = "train"
        else:
            held[name] += sizes[topic]
        sides[name] += [{"text": piece + "\n", "source": f"topic:{topic}"} for piece in cut(kept[topic])]
    return sides


def make(tasks: Iterable[str], sources: Iterable[tuple[str, str]], *, seed: int = 0) -> dict[str, list[Row]]:
    """The rows of the named tasks by file ("signatures/train"), from `sources`, which are (path, text)."""
    chosen = list(tasks)
    pools = split(functions(sources), seed=seed) if set(chosen) != {"reference"} else {}
    made = {}
    for task in chosen:
        sides = reference(language_reference) if task == "reference" else {}
        for name, size in SIZES.items():
            made[f"{task}/{name}"] = sides[name] if sides else chats(task, pools[name], size=size)
    return made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to, one folder per task inside it")
    parser.add_argument("--task", action="append", choices=[*TASKS, "reference"], help="default: the committed two")
    parser.add_argument("--seed", type=int, default=0, help="draws which signatures are taken, and their order")
    args = parser.parse_args()
    for name, rows in make(args.task or COMMITTED, files(), seed=args.seed).items():
        file = args.out / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.write_text(text, encoding="utf-8", newline="\n")
        print(f"{file}: {len(rows)} rows, {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
