"""Write the embedded tasks as JSONL files, generated from the running Python's standard library.

    python scripts/make_tasks.py assets/tasks                        # the two committed tasks: signatures and reference
    python scripts/make_tasks.py out --task defaults --task count    # more tasks over the same signatures

The rows of a task over signatures are chats: the question is a function's signature, and the answer is derived from its
syntax tree (for `docstring`, from the docstring). The question does not name the task, so the tasks contradict each
other on purpose. `valid` and `test` come from the files that `stdlib_text.held_out` keeps for evaluation, and `train`
from all others. A signature is in one split only, and in `valid` or `test` only if no file of the pre-training text
contains it. The share of a file's rows with the same answer is limited (`Task.most`), so that a constant answer does
not score well.

The rows of `reference` are plain text: the language reference in `pydoc_data.topics`, cut at paragraphs and split by
topic.
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
SIZES = {"train": 5000, "valid": 200, "test": 400}  # maximum number of rows in a file of a task over signatures
MOST = 0.02  # largest share of a split that one list of argument names may have
LONGEST = 260  # maximum characters of signature and argument names together: up to about 128 tokens
PIECE = 1500  # maximum characters in one piece of the language reference
SHARED = 60  # a paragraph of the reference with at least this many characters is kept in one topic only


@dataclass(frozen=True)
class Function:
    """One function of the standard library."""

    signature: str  # on one line, as ast.unparse writes it: "def read(self, size=-1) -> bytes:"
    node: ast.FunctionDef | ast.AsyncFunctionDef  # its syntax tree
    source: str  # "path.py:LINE", the path relative to the standard library


@dataclass(frozen=True)
class Task:
    """How the answers of a task over signatures are made."""

    answer: Callable[[Function], str | None]  # None for a function without an answer, which gives no row
    most: float  # largest share of a file's rows that may have the same answer


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Source of a function's definition in one line, without decorators and body."""
    head = copy.copy(node)
    head.body, head.decorator_list = [ast.Pass()], []
    return ast.unparse(head).rsplit("\n", 1)[0]


def functions(sources: Iterable[tuple[str, str]]) -> Iterator[Function]:
    """Yield all functions with arguments in `sources`, pairs of path and text; skip files that do not parse."""
    for path, text in sources:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # test files with deprecated escapes
                tree = ast.parse(text)
        except (SyntaxError, ValueError):  # test files that are broken on purpose or in Python 2
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and arguments(node):
                yield Function(signature(node), node, f"{path}:{node.lineno}")


def side(path: str) -> str:
    """Split of the file at `path`: train, valid or test. The second byte of its hash divides the held-out files."""
    if not held_out(path):
        return "train"
    return "valid" if hashlib.sha256(path.encode()).digest()[1] < 85 else "test"


def rank(function: Function, seed: str) -> bytes:
    """Sort key for an order drawn with `seed`, which does not change when other functions are added or removed."""
    return hashlib.sha256(f"{seed} {function.signature}".encode()).digest()


def split(found: Iterable[Function], *, seed: int) -> dict[str, list[Function]]:
    """Functions with distinct signatures by split, in an order drawn with `seed`.

    A signature that occurs in several files belongs to `train` if possible, else to `test`, else to `valid`. Long
    signatures are removed after this assignment. More than half of all functions only take `self`; so the share of
    each list of argument names in a split is limited to MOST.
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
    """The first pairs of function and answer, at most `size`, such that no answer has more than the share `most`."""
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
    """Arguments of a function in source order, each with its default or None."""
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [*[None] * (len(positional) - len(a.defaults)), *a.defaults]
    pairs = list(zip(positional, defaults, strict=True))
    pairs += [(a.vararg, None)] if a.vararg else []
    pairs += list(zip(a.kwonlyargs, a.kw_defaults, strict=True))
    return pairs + ([(a.kwarg, None)] if a.kwarg else [])


def names(function: Function) -> str:
    """Names of the arguments, without stars, defaults and annotations: "self, size, strict"."""
    return ", ".join(arg.arg for arg, _ in arguments(function.node))


def default_values(function: Function) -> str:
    """Source of the default values in order, or "none"."""
    return ", ".join(ast.unparse(default) for _, default in arguments(function.node) if default) or "none"


def annotation_values(function: Function) -> str:
    """Source of the arguments' annotations in order, then "-> " and the result's annotation, or "none"."""
    found = [ast.unparse(arg.annotation) for arg, _ in arguments(function.node) if arg.annotation]
    if function.node.returns:
        found.append("-> " + ast.unparse(function.node.returns))
    return ", ".join(found) or "none"


def call_form(function: Function) -> str:
    """A call that passes each argument on under its own name: "read(self, size=size, strict=strict)".

    An argument with a default is passed by keyword, unless it is positional-only or comes before `*args`.
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
    """Number of arguments, including `self`."""
    return str(len(arguments(function.node)))


def first_word(function: Function) -> str | None:
    """First word of the docstring; None without a docstring, or if it does not start with a letter."""
    word = re.match(r"[A-Za-z]+", ast.get_docstring(function.node) or "")
    return word[0] if word else None


def camel_case(function: Function) -> str | None:
    """The function's name in CamelCase: `_read_all` is "ReadAll"; None for a name of underscores only."""
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
    """Make at most `size` rows of the task `name` from the functions in `pool` that have an answer."""
    task = TASKS[name]
    answered = [(f, answer) for f in pool if (answer := task.answer(f)) is not None]
    chosen = thin(answered, size=size, most=task.most)
    rows: list[Row] = []
    # thin() prefers rows with frequent answers at first, so the rows are put in another order.
    for function, answer in sorted(chosen, key=lambda pair: rank(pair[0], name)):
        messages = [{"role": "user", "content": function.signature}, {"role": "assistant", "content": answer}]
        rows.append({"task": name, "messages": messages, "source": function.source})
    return rows


def own_paragraphs(topics: Mapping[str, str]) -> dict[str, list[str]]:
    """Paragraphs of each topic, without those that a longer topic also has.

    Topics overlap ("if" is a section of "compound"); a topic that mostly repeats longer ones is left out.
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
    """Join paragraphs to pieces of at most PIECE characters; longer paragraphs are cut between lines."""
    parts = []  # (separator before the part, part)
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
    """Rows of the `reference` task by split; `valid` and `test` each get about a tenth of the text, in whole topics.

    In the order of their hash, topics go to whichever of `valid` and `test` has less text. A topic that does not fit,
    or that is longer than a third of the tenth, goes to `train`, so that `valid` and `test` have several topics each.
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
    """Rows of the given tasks by file ("signatures/train"), from `sources`, pairs of path and text."""
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
    parser.add_argument("out", type=Path, help="output folder; gets one folder per task")
    parser.add_argument(
        "--task",
        action="append",
        choices=[*TASKS, "reference"],
        help="task to write; can be repeated; default: the two committed tasks",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice and the order of signatures")
    args = parser.parse_args()
    for name, rows in make(args.task or COMMITTED, files(), seed=args.seed).items():
        file = args.out / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.write_text(text, encoding="utf-8", newline="\n")
        print(f"{file}: {len(rows)} rows, {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
