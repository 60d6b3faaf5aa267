"""The embedded tasks: nothing leaks between the sides, every answer is right, and the script that makes them."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import types
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "assets" / "tasks"
SIDES = ("train", "valid", "test")
sys.path.insert(0, str(ROOT / "scripts"))

import make_tasks  # noqa: E402
from stdlib_text import held_out  # noqa: E402

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SMALL = ("argparse.py", "bz2.py", "calendar.py", "optparse.py", "subprocess.py", "traceback.py")


@cache
def committed(task: str, side: str) -> list[dict]:
    with (TASKS / task / f"{side}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def question(row: dict) -> str:
    return row["messages"][0]["content"]


def answer(row: dict) -> str:
    return row["messages"][1]["content"]


def path(row: dict) -> str:
    return row["source"].rsplit(":", 1)[0]


def code_of(signature: str, body: str = "pass") -> types.CodeType:
    """The compiled function with this signature."""
    head = signature.removeprefix("async ")
    module = compile(f"{head} {body}", "signature", "exec", dont_inherit=True)
    name = head.removeprefix("def ").split("(")[0]
    (code,) = (c for c in module.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
    return code


def compiled_names(signature: str) -> list[str]:
    """The argument names in the order of the source, as the compiler sees them."""
    code = code_of(signature)
    first, keyword = code.co_argcount, code.co_kwonlyargcount
    names = list(code.co_varnames)
    positional, by_keyword, stars = names[:first], names[first : first + keyword], names[first + keyword :]
    args = [stars.pop(0)] if code.co_flags & 0x04 else []
    return positional + args + by_keyword + stars[: bool(code.co_flags & 0x08)]


@pytest.fixture(scope="module")
def small() -> list[tuple[str, str]]:
    return [(path, (LIBRARY / path).read_text(encoding="utf-8")) for path in SMALL]


# --- the committed rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_signature_rows_are_chats_of_one_question_and_one_answer(side: str) -> None:
    for row in committed("signatures", side):
        assert row.keys() == {"task", "messages", "source"}
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert re.fullmatch(r"(async )?def \w+\(.+\)( -> .+)?:", question(row)), row
        assert answer(row)
        assert re.fullmatch(r"[\w/-]+\.py:[1-9]\d*", row["source"]), row


@pytest.mark.parametrize("side", SIDES)
def test_reference_rows_are_text(side: str) -> None:
    for row in committed("reference", side):
        assert row.keys() == {"text", "source"}
        assert row["text"].strip()
        assert len(row["text"]) <= make_tasks.PIECE + 1


@pytest.mark.parametrize("side", SIDES)
def test_every_answer_follows_from_its_question(side: str) -> None:
    wrong = [r for r in committed("signatures", side) if answer(r) != ", ".join(compiled_names(question(r)))]
    assert not wrong


def test_source_files_are_on_one_side_and_on_the_side_of_pre_training() -> None:
    found = {side: {path(row) for row in committed("signatures", side)} for side in SIDES}
    assert not found["valid"] & found["test"]
    assert not any(held_out(p) for p in found["train"])
    assert all(held_out(p) for p in found["valid"] | found["test"])


def test_no_signature_stands_twice() -> None:
    questions = Counter(question(row) for side in SIDES for row in committed("signatures", side))
    assert questions.most_common(1)[0][1] == 1


@pytest.mark.parametrize("side", SIDES)
def test_a_constant_answer_scores_nothing(side: str) -> None:
    rows = committed("signatures", side)
    assert Counter(map(answer, rows)).most_common(1)[0][1] <= 0.02 * len(rows)


def test_topics_and_paragraphs_of_the_reference_are_on_one_side() -> None:
    topics: dict[str, str] = {}
    paragraphs: dict[str, str] = {}
    for side in SIDES:
        for row in committed("reference", side):
            assert topics.setdefault(row["source"], side) == side
            for paragraph in row["text"].split("\n\n"):
                key = " ".join(paragraph.split())
                assert len(key) < make_tasks.SHARED or paragraphs.setdefault(key, side) == side, key


def test_the_sides_of_the_reference_are_80_10_10() -> None:
    sizes = {side: sum(len(row["text"]) for row in committed("reference", side)) for side in SIDES}
    assert 0.08 < sizes["valid"] / sum(sizes.values()) <= 0.105
    assert 0.08 < sizes["test"] / sum(sizes.values()) <= 0.105


def test_the_readme_says_what_is_there() -> None:
    text = (TASKS / "README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\S+)\.jsonl` \| (\d+ \| \d+) ", text, re.MULTILINE))
    there = {}
    for task in make_tasks.COMMITTED:
        for side in SIDES:
            rows = committed(task, side)
            sources = {path(row) if task == "signatures" else row["source"] for row in rows}
            there[f"{task}/{side}"] = f"{len(rows)} | {len(sources)}"
    assert told == there


def test_simple_rules_score_what_the_readme_says() -> None:
    known = {question(row).split("(", 1)[1]: answer(row) for row in committed("signatures", "train")}
    rows = committed("signatures", "test")
    same_list = sum(known.get(question(row).split("(", 1)[1]) == answer(row) for row in rows) / len(rows)
    between = sum(f"({answer(row)}):" in question(row) for row in rows) / len(rows)
    text = (TASKS / "README.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| (?:the answer of|the text between).* \| (0\.\d\d) \|$", text, re.MULTILINE)
    assert told == [f"{same_list:.2f}", f"{between:.2f}"]


def test_sources_name_the_line_of_the_function() -> None:
    made_by = re.search(r"Python (\d+\.\d+\.\d+)", (TASKS / "README.md").read_text(encoding="utf-8"))[1]
    if platform.python_version() != made_by:
        pytest.skip(f"the rows are from Python {made_by}, another release has its functions on other lines")
    for row in committed("signatures", "test"):
        file, number = row["source"].rsplit(":", 1)
        text = (LIBRARY / file).read_text(encoding="utf-8")
        line = text.split("\n")[int(number) - 1]
        assert line.split("(")[0].strip() == question(row).split("(")[0], row


def test_rows_fit_in_128_tokens_of_the_embedded_model() -> None:
    file = ROOT / "assets" / "tiny-python" / "tokenizer.json"
    if not file.exists():
        pytest.skip("no embedded model in this checkout")
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(file))
    rows = [row for side in SIDES for row in committed("signatures", side)]
    texts = [f"<|user|>{question(row)}<|end|><|assistant|>{answer(row)}<|end|>" for row in rows]
    assert max(len(encoding.ids) for encoding in tokenizer.encode_batch(texts)) <= 128


def test_the_notice_holds_the_license_and_no_path_of_a_machine() -> None:
    text = (ROOT / "assets" / "NOTICE").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in text
    assert re.search(r"Copyright \(c\) 2001.*2023 Python Software Foundation", text)
    assert not re.search(r"(?<![\w:/])/(home|root|usr|opt|tmp|Users)/", text)


# --- the script ------------------------------------------------------------------------------------------------------


def test_two_processes_write_the_same(small: list[tuple[str, str]]) -> None:
    program = (
        "import json, sys; sys.path.insert(0, 'scripts'); import make_tasks as m\n"
        "print(json.dumps(m.make([*m.TASKS, 'reference'], json.load(sys.stdin))))"
    )
    outputs = []
    for seed in ("1", "2"):  # of str.__hash__, which orders sets
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
        command, text = [sys.executable, "-c", program], json.dumps(small).encode()
        outputs.append(subprocess.run(command, input=text, cwd=ROOT, env=environment, check=True, capture_output=True))
    assert outputs[0].stdout == outputs[1].stdout
    assert json.loads(outputs[0].stdout)["signatures/train"]


def test_the_seed_draws_the_rows(small: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_tasks, "SIZES", {"train": 50})
    first, second = (make_tasks.make(["signatures"], small, seed=seed)["signatures/train"] for seed in (0, 1))
    assert len(first) == len(second) == 50
    assert len({question(r) for r in first} & {question(r) for r in second}) < 40


def test_siblings_ask_the_same_and_keep_to_their_largest_share(small: list[tuple[str, str]]) -> None:
    made = make_tasks.make(make_tasks.TASKS, small)
    pool = {question(row) for row in made["signatures/train"]}
    for name, task in make_tasks.TASKS.items():
        rows = made[f"{name}/train"]
        assert rows
        assert all(row["task"] == name for row in rows)
        assert {question(row) for row in rows} <= pool
        assert Counter(map(answer, rows)).most_common(1)[0][1] <= max(1, task.most * len(rows))


def test_what_pre_training_read_is_not_asked_in_an_evaluation() -> None:
    paths = {make_tasks.side(p): p for p in (f"module_{i}.py" for i in range(200))}
    assert paths.keys() == set(SIDES)
    head = "def f(a, b):\n    '''Doc.'''\n"
    made = make_tasks.make(
        ["signatures"],
        [
            (paths["test"], head + "def g(a, c): pass\n"),
            (paths["train"], "class C:\n    def f(self): pass\n    @property\n    def f(a,\n          b): return 1\n"),
            (paths["valid"], head + "def g(a, c): pass\ndef h(a, d): pass\n"),
        ],
    )
    got = {side: [question(row) for row in made[f"signatures/{side}"]] for side in SIDES}
    assert sorted(got["train"]) == ["def f(a, b):", "def f(self):"]
    assert got["test"] == ["def g(a, c):"]
    assert got["valid"] == ["def h(a, d):"]


ANSWERS = [
    (
        "async def read_all(self, size: int=-1, *, strict=False) -> bytes:\n    'Reads it.'",
        {
            "signatures": "self, size, strict",
            "defaults": "-1, False",
            "annotations": "int, -> bytes",
            "call": "read_all(self, size=size, strict=strict)",
            "count": "3",
            "docstring": "Reads",
            "camel": "ReadAll",
        },
    ),
    (
        "def __f(a, b=(1, 2), /, c='x, y', *args: str, d, e=None, **kw): pass",
        {
            "signatures": "a, b, c, args, d, e, kw",
            "defaults": "(1, 2), 'x, y', None",
            "annotations": "str",
            "call": "__f(a, b, c, *args, d=d, e=e, **kw)",
            "count": "7",
            "camel": "F",
        },
    ),
    (
        "def _(x): '1 is not a word'",
        {"signatures": "x", "defaults": "none", "annotations": "none", "call": "_(x)", "count": "1"},
    ),
]


@pytest.mark.parametrize(("text", "expected"), ANSWERS)
def test_answers(text: str, expected: dict[str, str]) -> None:
    (function,) = make_tasks.functions([("a.py", text)])
    answers = {name: task.answer(function) for name, task in make_tasks.TASKS.items()}
    assert {name: a for name, a in answers.items() if a is not None} == expected


def test_the_call_form_passes_every_argument_to_its_own_name() -> None:
    heads = [question(row) for row in committed("signatures", "test")]
    for function in make_tasks.functions([("a.py", "\n".join(head + " pass" for head in heads))]):
        code = code_of(function.signature, "return all_arguments()")
        target = types.FunctionType(code, {"all_arguments": locals})  # no defaults: what is not passed is an error
        names = compiled_names(function.signature)
        values: dict[str, object] = {name: object() for name in names}
        if function.node.args.vararg:
            values[function.node.args.vararg.arg] = (object(),)
        if function.node.args.kwarg:
            values[function.node.args.kwarg.arg] = {"another name": object()}
        form = make_tasks.call_form(function).replace(function.node.name, "the_target", 1)
        assert eval(form, {"the_target": target, **values}) == values, form


def test_long_paragraphs_are_cut_between_lines() -> None:
    line = "| a table's row |"
    table = "\n".join(f"{line}{i:03}" for i in range(200))
    pieces = make_tasks.cut(["First.", table, "Last."])
    assert all(len(piece) <= make_tasks.PIECE for piece in pieces)
    assert "\n".join(pieces).split() == "\n\n".join(["First.", table, "Last."]).split()
    assert all(re.fullmatch(r"First\.|Last\.||\| a table's row \|\d{3}", ln) for p in pieces for ln in p.split("\n"))


def test_a_topic_inside_a_longer_one_is_left_out() -> None:
    shared, own, short = "shared words " * 20, "its own words " * 20, "Example:"
    topics = {"part": f"{short}\n\n{shared}", "whole": f"{shared}\n\n{short}\n\n{own}", "other": f"{short}\n\nAnother."}
    kept = make_tasks.own_paragraphs(topics)
    assert kept.keys() == {"other", "whole"}
    assert kept["other"] == [short, "Another."]
