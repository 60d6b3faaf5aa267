"""Reading rows: formats, and every refusal with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reparam.data.row import Row
from reparam.data.rows import read_rows
from reparam.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def write(folder: Path, *lines: object) -> Path:
    """A JSONL file; strings and bytes are written as they are."""
    path = folder / "rows.jsonl"
    raw = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(raw))
    return path


def problems(path: Path) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    return caught.value.problems


def problem(folder: Path, line: object) -> str:
    """The only problem of a file with this second line; the message must name the line."""
    path = write(folder, CHAT, line)
    (found,) = problems(path)
    where = f"{path}:2"
    assert found.startswith(where)
    return found.removeprefix(where)


# --- what is read ---


def test_three_formats_keep_their_other_columns(tmp_path):
    path = write(tmp_path, CHAT | {"task": "x"}, {"prompt": "p", "completion": "c", "score": 1.5})
    chat, completion = read_rows(path)
    assert chat == Row("chat", f"{path}:1", messages=tuple(CHAT["messages"]), columns={"task": "x"})
    assert completion == Row("completion", f"{path}:2", prompt="p", completion="c", columns={"score": 1.5})
    path = write(tmp_path, {"text": "t", "id": 3})
    assert read_rows(path) == [Row("text", f"{path}:1", text="t", columns={"id": 3})]


def test_messages_keep_keys_beside_role_and_content(tmp_path):
    message = {"role": "tool", "content": "4", "name": "add"}
    assert read_rows(write(tmp_path, {"messages": [message]}))[0].messages == (message,)


def test_blank_lines_carriage_returns_and_byte_order_mark(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(CHAT).encode() + b"\r", "", "  ", CHAT, "")
    assert [row.source for row in read_rows(path)] == [f"{path}:1", f"{path}:4"]


def test_only_newlines_end_a_line(tmp_path):
    # U+2028 and U+0085 end a line for str.splitlines, a carriage return for bytes.splitlines, none of them in JSONL
    path = write(tmp_path, '{"text":\r"a\u2028b\u0085c"}', {"text": "d"})
    assert [(row.text, row.source) for row in read_rows(path)] == [
        ("a\u2028b\u0085c", f"{path}:1"),
        ("d", f"{path}:2"),
    ]


@settings(deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1), raw=st.booleans())
def test_any_text_comes_back(texts, raw, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes("\n".join(json.dumps({"text": t}, ensure_ascii=not raw) for t in texts).encode())
    assert [row.text for row in read_rows(path)] == texts


# --- what is refused ---


def test_no_such_file_names_the_nearest(tmp_path):
    write(tmp_path, CHAT)
    (tmp_path / "other.txt").touch()
    (found,) = problems(tmp_path / "row.jsonl")
    assert found == f"{tmp_path / 'row.jsonl'}: no such file; that folder contains rows.jsonl"


def test_no_such_folder(tmp_path):
    (found,) = problems(tmp_path / "data" / "rows.jsonl")
    assert "does not exist" in found


def test_a_folder(tmp_path):
    (found,) = problems(tmp_path)
    assert "the folder holds no data files" in found


@pytest.mark.parametrize("content", [b"", b"\n \n\n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path, content):
    path = write(tmp_path, content)
    (found,) = problems(path)
    assert found.startswith(f"{path}: the file is empty")


def test_malformed_json_has_line_and_column(tmp_path):
    assert problem(tmp_path, '{"text": "a",}').startswith(":14: malformed JSON")
    assert problem(tmp_path, '{"text": "a"} {"text": "b"}').startswith(":15: malformed JSON")


def test_a_pretty_printed_array_gets_a_hint(tmp_path):
    found = problems(write(tmp_path, "[", '{"text": "a"}', "]"))
    assert "one complete object per line" in found[0]


def test_absurd_json_is_a_problem_of_its_line(tmp_path):
    assert "malformed JSON" in problem(tmp_path, "[" * 100_000)
    assert "malformed JSON" in problem(tmp_path, '{"text": ' + "1" * 5000 + "}")


@pytest.mark.parametrize(
    ("line", "what"), [("[1]", "a list"), ('"x"', "a string"), ("1", "a number"), ("null", "null")]
)
def test_not_an_object(tmp_path, line, what):
    assert problem(tmp_path, line).endswith(f"got {what}")


def test_bad_utf8_names_line_byte_and_offset(tmp_path):
    line = b'{"text": "caf\xe9"}'
    at = len(json.dumps(CHAT)) + 1 + line.index(b"\xe9")
    assert problem(tmp_path, line) == f": byte 0xe9 at offset {at} is not UTF-8"


def test_bad_utf8_behind_a_byte_order_mark(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"text": "\xff"}')
    assert problems(path) == (f"{path}:1: byte 0xff at offset 13 is not UTF-8",)


def test_utf16(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}', encoding="utf-16")
    assert "UTF-16" in problems(path)[0]


def test_half_a_surrogate_pair(tmp_path):
    found = problem(tmp_path, '{"prompt": "ab\\ud83d", "completion": "c"}')
    assert found == ': "prompt" holds half of a surrogate pair (\\ud83d) at character 2'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({}, "the row has no keys"),
        (
            {"question": "a", "answer": "b"},
            'the row has "question", "answer"; name the keys to read with --data.columns',
        ),
        ({"chosen": "a", "rejected": "b"}, "the row is a preference"),
        ({"Text": "a"}, 'did you mean "text" instead of "Text"?'),
        ({"message": []}, 'did you mean "messages" instead of "message"?'),
        ({"prompt": "a"}, '"prompt" without "completion"'),
        ({"completion": "a"}, '"completion" without "prompt"'),
        ({"prompt": "a", "completions": "b"}, 'did you mean "completion" instead of "completions"?'),
        (
            {"text": "a", "prompt": "b", "completion": "c"},
            'several formats in one row ("prompt", "completion", "text")',
        ),
        (CHAT | {"prompt": "p", "completion": "c"}, "several formats in one row"),
        ({"text": 1}, '"text" must be a string, got a number'),
        ({"text": ""}, '"text" is empty'),
        ({"prompt": ["a"], "completion": None}, '"prompt" and "completion" must both be strings'),
        ({"prompt": "a", "completion": None}, '"completion" must be a string, got null'),
        ({"messages": "hello"}, '"messages" must be a list, got a string'),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": ["hello"]}, "message 1 must be an object, got a string"),
        ({"messages": [{"content": "a"}]}, 'message 1 has no "role"'),
        ({"messages": [{"role": "user"}]}, 'message 1 has no "content"'),
        ({"messages": [{"role": "user", "content": None}]}, 'message 1 has no "content"'),
        ({"messages": [{"role": "user", "value": "a", "contents": "a"}]}, 'did you mean "content"'),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "part 1 of the content is 'text'; only parts",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part 1 of the content is 'image'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "part 1 of the content is 'a string'"),
        ({"messages": [{"role": "user", "content": 4}]}, '"content" must be a string, got a number'),
        (CHAT | {"tools": 3}, '"tools" must be a list of objects'),
        (CHAT | {"tools": ["f"]}, '"tools" must be a list of objects'),
        (CHAT | {"chat_template_kwargs": {"messages": []}}, '"chat_template_kwargs" must be an object without'),
        (CHAT | {"system": 3}, '"system" must be a string, got a number'),
        (CHAT | {"images": ["a.png"]}, '"images": only text is supported'),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "only answers of an assistant carry loss"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, '"weight" must be 0 or 1, got 0.5'),
        ({"messages": [{"role": "assistant", "content": "a", "train": "no"}]}, '"train" must be true or false'),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]}, "only an assistant calls tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "tool call 1 must be an object with"),
        ({"messages": [{"role": "gpt", "content": "a"}]}, "unknown role 'gpt'; expected one of"),
        ({"messages": [{"role": "human", "content": "a"}]}, "did you mean 'user'?"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'?"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role ['user']"),
    ],
)
def test_malformed_rows(tmp_path, line, expected):
    path = write(tmp_path, CHAT, line)
    found = problems(path)
    assert all(p.startswith(f"{path}:2: ") for p in found)
    assert expected in found[0]


def test_all_problems_of_a_row(tmp_path):
    found = problems(write(tmp_path, {"messages": [{"role": "gpt"}, "x"]}))
    assert len(found) == 3
    assert len(problems(write(tmp_path, {"prompt": 1, "completion": 2}))) == 2


def test_text_does_not_mix_but_chats_and_completions_do(tmp_path):
    path = write(tmp_path, CHAT, {"prompt": "p", "completion": "c"}, {"text": "a"}, {"text": "b"})
    (found,) = problems(path)
    assert found.startswith(f"{path}:3: a text row in a file that also has chat rows ({path}:1)")
    assert "the 2 text rows" in found


def test_ten_problems_are_shown_and_the_rest_counted(tmp_path):
    path = write(tmp_path, *[{f"x{i}": 1} for i in range(1212)])
    with pytest.raises(ValueError, match="1,202 more") as caught:
        read_rows(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert [line.startswith(f"{path}:{i}: ") for i, line in enumerate(lines[:10], start=1)] == [True] * 10


def test_a_problem_of_several_rows_is_told_once(tmp_path):
    path = write(tmp_path, *[{"qestion": "2 + 2 =", "answer": "4"}] * 80, {"question": 3, "answer": "1"})
    with pytest.raises(DataError) as caught:
        read_rows(path, {"prompt": "question", "completion": "answer"})
    first, other = str(caught.value).splitlines()
    assert first.startswith(f'{path}:1: no "question", which data.columns names')
    assert first.endswith("(and in 79 more rows)")
    assert other.startswith(f"{path}:81: ")
    assert "more row" not in other
