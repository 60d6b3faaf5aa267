"""Chats in OpenAI's format, which TRL and transformers read.

A call of a function in the older form (`function_call`, and answers with the role `function`) becomes a tool call.
"""

from __future__ import annotations

from typing import Any

from reparam.data.formats.format import Format, chat_row, read_json
from reparam.data.row import Row


def _read(value: dict[str, Any], source: str) -> Row:
    messages = read_json(value.pop("messages"))
    if isinstance(messages, list):
        messages = [_current(message) if isinstance(message, dict) else message for message in messages]
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        if "prompt" in value and value["prompt"] == first.get("content"):
            del value["prompt"]  # some data sets repeat the first question
    return chat_row(messages, value, source)


def _current(message: dict[str, Any]) -> dict[str, Any]:
    """The message with tool calls in place of the older function calls, and without keys that hold null."""
    result = {key: held for key, held in message.items() if held is not None or key == "content"}
    if isinstance(called := result.pop("function_call", None), dict):
        result["tool_calls"] = [{"type": "function", "function": called}]
    if result.get("role") == "function":
        result["role"] = "tool"
    return result


FORMAT = Format(
    ("messages",), '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}', _read
)
