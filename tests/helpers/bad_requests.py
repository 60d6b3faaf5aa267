"""Bad requests by kind: for each a path, a body, the status that it must get, and a word of the message."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple


class Bad(NamedTuple):
    kind: str
    path: str
    body: bytes
    status: int
    word: str = ""


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    TEXT: {"model": "a", "prompt": "hi", "max_tokens": 1},
}
WRONG: dict[str, list[Any]] = {
    "model": [None, "", 5, ["a"], {}, True, "x" * 513],
    "temperature": [-0.1, 2.1, "0.5", [], True, 1e999, -1e999],
    "top_p": [0, -1, 1.5, "1", {}, True],
    "top_k": [-2, 1.5, "3", 2**40, True],
    "n": [0, 17, -1, 1.5, "1", True, 10**30],
    "seed": [-1, 2**63, 1.5, "1", True],
    "stop": ["", [""], 5, ["a", 5], {}, ["a"] * 17, "x" * 257, [["a"]]],
    "stream": ["true", 1, [], {}],
    "stream_options": [{}, {"include_usage": True}, 5],  # only with stream
    "max_tokens": [0, -1, 1.5, "1", 4097, 10**30, True, [1]],
}
ONLY: dict[str, dict[str, list[Any]]] = {
    CHAT: {
        "messages": [
            None,
            [],
            {},
            "hi",
            [5],
            [{}],
            [{"role": "user"}],
            [{"content": "x"}],
            [{"role": "human", "content": "x"}],
            [{"role": "user", "content": 5}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            [{"role": "user", "content": "x", "weight": 1}],
            [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}],
            [{"role": "assistant", "content": None}],
        ],
        "logprobs": ["true", 1],
        "top_logprobs": [0, 5, 21, -1, "1"],
        "tools": ["f", {}, [5], [{"type": "function"}] * 129],
        "tool_choice": ["auto", "required", {"type": "function"}],
        "max_completion_tokens": [0, 2, "1", 5000],
        "chat_template_kwargs": [5, [], {"messages": []}, {"tools": []}, {"add_generation_prompt": False}],
    },
    TEXT: {
        "prompt": [
            None,
            5,
            {},
            [],
            "",
            [""],
            [[]],
            [-1],
            [4096],
            [10**20],
            ["a", 5],
            [True],
            [1.5],
            [[5], "a"],
            ["a"] * 129,
        ],
        "logprobs": [-1, 21, True, "1"],
    },
}
UNHONORED = {
    "logit_bias": {"5": 1},
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "repetition_penalty": 1.1,
    "min_p": 0.1,
    "response_format": {"type": "json_object"},
    "user": "me",
    "store": True,
    "metadata": {"a": "b"},
    "best_of": 2,
    "echo": True,
    "suffix": "x",
    "guided_json": {},
    "use_beam_search": True,
    "functions": [],
    "unknown": None,
    "Model": "a",
    "__proto__": {},
}
RAW = {
    "nothing": b"",
    "a space": b" ",
    "no JSON": b"hello",
    "half of JSON": b'{"model": "a"',
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "a text": b'"a"',
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "zero bytes": b"\0" * 64,
    "very deep": b"[" * 100_000,
    "deep inside": b'{"model": "a", "messages": '
    + b"[" * 500
    + b"]" * 500
    + b', "prompt": '
    + b"[" * 500
    + b"]" * 500
    + b"}",
    "a long number": b'{"model": "a", "n": ' + b"9" * 10_000 + b"}",
    "two of JSON": b'{"model": "a"}{"model": "a"}',
    "half a surrogate pair": b'{"model": "a", "prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud8"}]}',
    "half a surrogate pair in a key": b'{"model": "a", "\\udfff": 1}',
}


def each() -> Iterator[Bad]:
    """One bad request of every kind and place."""
    for path, good in GOOD.items():
        for kind, body in RAW.items():
            yield Bad(kind, path, body, 400)
        for field, value in UNHONORED.items():
            yield Bad("not honored", path, json.dumps({**good, field: value}).encode(), 400, field)
        for field, values in {**WRONG, **ONLY[path]}.items():
            for value in values:
                if value is None and field not in ("model", "prompt", "messages"):
                    continue
                if field == "top_logprobs" and value in (0, 5):
                    body = {**good, field: value}  # without logprobs
                else:
                    body = {**good, **({"logprobs": True} if field == "top_logprobs" else {}), field: value}
                word = "the prompt" if value in ("", [""], [[]], [], [4096], [10**20]) and field == "prompt" else field
                yield Bad(f"wrong {field}", path, json.dumps(body).encode(), 400, "" if field == "prompt" else word)
        for field in ("model", "messages" if path == CHAT else "prompt"):
            yield Bad("missing", path, json.dumps({k: v for k, v in good.items() if k != field}).encode(), 400, field)
        for name in ("c", "A", "../a", "a\0", "a\n", "tiny+a", "a+c", "sum-" + "0" * 64, "%2e%2e"):
            yield Bad("unknown model", path, json.dumps({**good, "model": name}).encode(), 404, "no model")


def many(count: int, seed: int) -> Iterator[Bad]:
    """Bad requests that are each made of two of them, or have changed bytes."""
    random_ = random.Random(seed)
    known = list(each())
    for _ in range(count):
        bad = random_.choice(known)
        try:
            body, other = json.loads(bad.body), json.loads(random_.choice(known).body)
        except (ValueError, RecursionError):
            body = other = None
        if isinstance(body, dict) and isinstance(other, dict) and random_.random() < 0.7:
            yield Bad("two at once", bad.path, json.dumps({**other, **body}).encode(), 400)
        else:
            raw = bytearray(bad.body[:2000])
            for _ in range(random_.randint(1, 4)):
                if raw:
                    raw[random_.randrange(len(raw))] = random_.randrange(256)
            yield Bad("changed bytes", bad.path, bytes(raw[: random_.randint(0, len(raw))]), 400)
