"""The places of images in a text or a chat, written as `<image>`. Without any, images come first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reparam.core.text import counted

MARK = "<image>"


def with_places(text: str, images: int, *, line: bool) -> str:
    """The text with a place for each image: as it is if it has places, and otherwise with all of them at its start.

    With `line`, places at the start are followed by a new line. Raises ValueError if it has another number of places.

    >>> with_places("What is this?", 1, line=True)
    '<image>\\nWhat is this?'
    """
    found = text.count(MARK)
    if not found and images:
        return MARK * images + ("\n" if line else "") + text
    if found != images:
        raise ValueError(f"{counted(found, 'place')} {MARK} for {counted(images, 'image')}; give as many")
    return text


def placed_messages(messages: Sequence[Mapping[str, Any]], images: int) -> list[Mapping[str, Any]]:
    """The messages of a chat with a place for each image; without any place, at the start of the first user message.

    A content may be a list of parts, of the types "image" and "text". Raises ValueError if the number of places is not
    that of the images.
    """
    found: list[Mapping[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(
                MARK if part.get("type") in ("image", "image_url") else str(part.get("text", ""))
                for part in content
                if isinstance(part, Mapping)
            )
        found.append({**message, "content": content})
    places = sum(str(message["content"]).count(MARK) for message in found if message["content"])
    first = next((number for number, message in enumerate(found) if message.get("role") == "user"), None)
    if not places and images:
        if first is None:
            raise ValueError(f"no message of the role user, for {counted(images, 'image')}")
        content = with_places(str(found[first]["content"]), images, line=True)
        found[first] = {**found[first], "content": content}
    elif places != images:
        raise ValueError(f"{counted(places, 'place')} {MARK} for {counted(images, 'image')}; give as many")
    return found
