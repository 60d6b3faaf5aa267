"""Rows with images, read and checked.

A row has one of the formats of `data/formats`, and `image` or `images`: paths below the folder of its file, or base64.
In chats, images may also stand in the parts of a message. `<image>` in the text is the place of an image; without one,
images come first. A `text` is learned like a completion without a prompt, or after its image.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from reparam.data.formats import read_row
from reparam.data.row import Row
from reparam.data.rows import Reading
from reparam.errors import DataError
from reparam.images.places import MARK, placed_messages, with_places
from reparam.images.sources import Source, check_header, source_of

KEYS = ("image", "images")


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a row, in the order of their places."""

    sources: tuple[Source, ...]
    digest: str
    """SHA-256 of their bytes."""


class ImageRows(Reading):
    """A stream of rows whose images are checked and kept in `found`, by the rows' places.

    Besides what `Reading` refuses, it raises DataError, at its end and with "file:line", for images that are missing,
    damaged, too large or outside of the folder of the data, and for rows with other numbers of places than images.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        columns: Mapping[str, str] | None = None,
        *,
        found: MutableMapping[str, Images],
        **settings: Any,
    ) -> None:
        self._image_columns = {key: name for key, name in (columns or {}).items() if key in KEYS}
        self._others = {key: name for key, name in (columns or {}).items() if key not in KEYS}
        super().__init__(sources, self._others, **settings)
        self._found = found

    def row_of(self, value: Mapping[str, Any], place: str) -> Row:
        """The row, with a place for each image. Raises DataError as the class says."""
        given = {key: held for key, held in value.items() if key not in self._image_columns.values()}
        given |= {key: value[name] for key, name in self._image_columns.items() if name in value}
        named = [given.pop(key, None) for key in KEYS]
        if named[0] is not None and named[1] is not None:
            raise DataError([f'{place}: "image" and "images" are both given; keep one'])
        values = [named[0]] if named[0] is not None else named[1] or []
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise DataError([f'{place}: "images" must be a list'])
        inner, given = _inside_messages(given)
        if inner and values:
            raise DataError([f"{place}: images stand in the messages and beside them; keep one"])
        row = _placed(read_row(given, place, self._others), len(inner or values), place)
        sources = tuple(source_of(each, place, _folder(place)) for each in inner or values)
        if sources:
            read = b"".join(hashlib.sha256(check_header(source)).digest() for source in sources)
            self._found[row.source] = Images(sources, hashlib.sha256(read).hexdigest())
        return row


def _folder(place: str) -> Path | None:
    """The folder of the file of a place ("file:line"); None if it is no file."""
    file = Path(place.rpartition(":")[0])
    return file.parent if file.is_file() else None


def _inside_messages(given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The images that stand in parts of messages, and the row with places instead of these parts."""
    messages, found = given.get("messages"), []
    if not isinstance(messages, list):
        return [], given
    changed: list[Any] = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            changed.append(message)
            continue
        parts: list[Any] = []
        for part in content:
            if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
                address = part.get("image_url")
                value = address.get("url") if isinstance(address, Mapping) else address
                value = value or next((part[key] for key in ("image", "path", "url", "base64") if part.get(key)), None)
                found += [value] if value is not None else []
                parts.append({"type": "text", "text": MARK})
            else:
                parts.append(part)
        changed.append({**message, "content": parts})
    return found, {**given, "messages": changed}


def _placed(row: Row, images: int, place: str) -> Row:
    """The row with a place for each image; a text becomes a completion."""
    if row.kind == "text":
        row = dataclasses.replace(row, kind="completion", prompt=MARK * images, completion=row.text, text="")
        if images and MARK in row.completion:
            raise DataError([f'{place}: "text" holds {MARK}, and its image comes first; leave it out'])
    answers = [m["content"] for m in row.messages if m["role"] == "assistant"] or [row.completion]
    if any(MARK in str(answer) for answer in answers):
        raise DataError([f"{place}: an answer holds {MARK}, which a model cannot say; leave it out"])
    try:
        if row.kind == "chat":
            return dataclasses.replace(row, messages=tuple(placed_messages(row.messages, images)))
        return dataclasses.replace(row, prompt=with_places(row.prompt, images, line=False))
    except ValueError as error:
        raise DataError([f"{place}: {error}"]) from None
