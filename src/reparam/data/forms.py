"""The form in which a chat template reads messages. Templates differ in it, and some write nothing for another form."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from reparam.data.messages import FLAGS

REASONING = ("reasoning_content", "thinking", "reasoning")  # the keys under which messages hold it


class Form(NamedTuple):
    """The form in which a template reads messages."""

    parts: bool = False
    """Contents are lists of parts, as templates of models that see expect."""
    json_arguments: bool = False
    """Arguments of tool calls are JSON in a string, as in OpenAI's format, and not objects."""
    null_content: bool = False
    """An empty content beside tool calls is null."""
    mark: str = ""
    """What stands for an image in a content, if models see; a part of the type "image" in a list of parts."""
    token: str = ""
    """What is written for an image in a content that is no list of parts."""

    def of(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message in this form, with its reasoning under each of the names that templates use."""
        result = {k: v for k, v in message.items() if k not in FLAGS}
        if (reasoning := reasoning_of(message)) is not None:
            result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
        if self.parts:
            result["content"] = self._parts(message["content"])
        elif self.mark:
            result["content"] = message["content"].replace(self.mark, self.token)
        if calls := message.get("tool_calls"):
            result["tool_calls"] = [self._call(call) for call in calls]
            if self.null_content and not message["content"]:
                result["content"] = None
        else:
            result.pop("tool_calls", None)
        return result

    def _parts(self, content: str) -> list[dict[str, str]]:
        """The parts of a content. Without images, it is one part, also if it is empty."""
        texts = content.split(self.mark) if self.mark else [content]
        if len(texts) == 1:
            return [{"type": "text", "text": content}]
        image, *found = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})]
        return [part for part in found if part["type"] == image["type"] or part["text"]]

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return {**call, "function": self._call(call["function"])}
        arguments = call.get("arguments", {})
        if self.json_arguments and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not self.json_arguments and isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                read = json.loads(arguments)
                arguments = read if isinstance(read, dict) else arguments
        return {**call, "arguments": arguments}


def reasoning_of(message: Mapping[str, Any]) -> Any:
    """The reasoning before an answer, or None."""
    return next((message[key] for key in REASONING if message.get(key) is not None), None)
