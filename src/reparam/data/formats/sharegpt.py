"""ShareGPT's chats: turns with `from` and `value`. LLaMA-Factory's roles for tools are read, too."""

from __future__ import annotations

from typing import Any

from reparam.data.formats.format import Format, chat_row, read_json
from reparam.data.row import Row
from reparam.errors import DataError

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool", "tool_response"), "tool"),
    "system": "system",
    "function_call": "assistant",
}


def _read(value: dict[str, Any], source: str) -> Row:
    turns = read_json(value.pop("conversations"))
    if isinstance(turns, list):
        turns = [message_of(turn, f"{source}: message {n}") for n, turn in enumerate(turns, start=1)]
    return chat_row(turns, value, source)


def message_of(turn: object, where: str) -> Any:
    """The message of a turn with `from` and `value`; anything else as it is. `where` is for the error message."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn  # a message with role and content is read as it is
    others = {key: held for key, held in turn.items() if key not in ("from", "value") and held is not None}
    role, content = turn["from"], turn.get("value")
    message = {**others, "role": ROLES.get(str(role).lower(), role), "content": content}
    if role == "function_call":
        call = read_json(content)
        calls = call if isinstance(call, list) else [call]
        if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in calls):
            raise DataError([f'{where}: a function call must be an object with "name" and "arguments"'])
        message |= {"content": "", "tool_calls": [{"type": "function", "function": each} for each in calls]}
    return message


FORMAT = Format(
    ("conversations",), '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}', _read
)
