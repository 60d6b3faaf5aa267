"""Decode images with Pillow, with limits: files of rows and their images are hostile until checked.

Only formats that Pillow decodes by itself are read. The size in a file's header is checked before anything is decoded,
so that a small file that would become a huge image (a decompression bomb) is refused.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam.errors import ConfigError, DataError
from reparam.io.staged import inside

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
LARGEST_FILE = 2**26
"""Bytes of the file of an image."""
MOST_PIXELS = 2**26
"""Pixels of an image, as its header tells."""
MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Source:
    """Where an image comes from: a file, or bytes that stand in the row itself."""

    name: str
    """What error messages call it."""
    path: Path | None = None
    content: bytes = field(default=b"", repr=False)

    def read(self) -> bytes:
        """The bytes of the file. Raises DataError, with the name, if it cannot be read or is too large."""
        if self.path is None:
            found = self.content
        else:
            try:
                with open(self.path, "rb") as file:
                    found = file.read(LARGEST_FILE + 1)
            except OSError as error:
                raise DataError([f"{self.name}: cannot be read: {error.strerror or error}"]) from None
        if len(found) > LARGEST_FILE:
            raise DataError([f"{self.name}: a file of more than {LARGEST_FILE:,} bytes; make the image smaller"])
        return found


def source_of(value: Any, where: str, folder: Path | None) -> Source:
    """The image that a row names: a path below `folder`, base64, or an object with "path" or "bytes".

    `where` is "file:line". Raises DataError, with this place, for anything else: a path that leads out of the folder,
    an address of the web, a file that does not exist.
    """
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("bytes", "base64", "path", "url") if value.get(key)), None)
    if isinstance(value, bytes):
        return Source(f"{where}: its image", content=value)
    if not isinstance(value, str) or not value:
        raise DataError(
            [f"{where}: an image is {_short(value)}; expected a path below the folder of the data, or base64"]
        )
    if value.startswith("data:"):
        head, _, body = value.partition(",")
        if not head.endswith(";base64"):
            raise DataError([f"{where}: the image {_short(value)} is a data address without base64"])
        return _decoded(body, where)
    if value.lower().startswith(("http://", "https://", "ftp://", "file:", "s3:")):
        raise DataError(
            [f"{where}: the image {_short(value)} is an address; save it to a file below the data's folder"]
        )
    if folder is not None and len(value) < 4096 and "\0" not in value:
        try:
            path = inside(folder, value)
            if path.is_file():
                return Source(f"{where}: the image {_short(value)}", path=path)
        except ValueError:
            raise DataError(
                [f"{where}: the image {_short(value)} leads out of the folder of the data, {folder}, so it is not read"]
            ) from None
        except OSError:
            pass  # a name that no file can have, such as long base64
    if len(value) >= 64 and (found := _decoded(value, where, sure=False)) is not None:
        return found
    place = f"there is no such file below {folder}" if folder is not None else "only a file of rows can name paths"
    raise DataError([f"{where}: the image {_short(value)}: {place}"])


def _decoded(text: str, where: str, *, sure: bool = True) -> Any:
    """The source with the bytes of base64; without `sure`, None if it is none."""
    try:
        if len(text) > LARGEST_FILE * 4 // 3 + 4:
            raise DataError([f"{where}: an image of more than {LARGEST_FILE:,} bytes; make it smaller"])
        return Source(f"{where}: its image", content=base64.b64decode("".join(text.split()), validate=True))
    except (binascii.Error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        if sure:
            raise DataError([f"{where}: the base64 of an image is damaged ({error})"]) from None
        return None


def check_header(source: Source) -> bytes:
    """The bytes of an image whose header is right and small enough. Raises DataError as `decoded` does."""
    found = source.read()
    _opened(found, source.name).close()
    return found


def upright(source: Any, channels: int) -> Image:
    """The image with the mode for this number of channels, turned as its EXIF orientation says."""
    library = pillow()
    from PIL import ImageOps

    if channels not in MODES:
        raise ConfigError(f"vision.channels: {channels}: images are decoded with 1 or 3 channels; pass tensors instead")
    if isinstance(source, str | Path):
        source = Source(str(source), path=Path(source))
    if isinstance(source, bytes):
        source = Source("the image", content=source)
    name = source.name if isinstance(source, Source) else "the image"
    image = _opened(source.read(), name) if isinstance(source, Source) else source
    if not isinstance(image, library.Image):
        raise DataError([f"{name}: expected an image of Pillow, a path, bytes or a tensor, got {type(image).__name__}"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = image.point(lambda value: value / 257).convert("L")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = library.alpha_composite(library.new("RGBA", image.size, "white"), image)
            return image.convert(MODES[channels])
    except Exception as error:  # Pillow's decoders raise many kinds
        if isinstance(error, MemoryError):
            raise
        raise DataError([f"{name}: the image is damaged: {_reason(error)}"]) from None


def _opened(content: bytes, name: str) -> Image:
    """The image with its header read. Raises DataError for another format, and for too many pixels."""
    library = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = library.open(io.BytesIO(content), formats=FORMATS)
    except library.DecompressionBombError:
        raise DataError(
            [f"{name}: a decompression bomb: more than {MOST_PIXELS:,} pixels; make the image smaller"]
        ) from None
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        known = "no image in a known format" if isinstance(error, library.UnidentifiedImageError) else _reason(error)
        raise DataError([f"{name}: {known}; expected {', '.join(FORMATS)}"]) from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise DataError(
            [
                f"{name}: a decompression bomb: {width:,} x {height:,} pixels in {len(content):,} bytes, more than "
                f"{MOST_PIXELS:,} pixels; make the image smaller"
            ]
        )
    if not width or not height:
        raise DataError([f"{name}: the image has no pixels"])
    return image


def pillow() -> Any:
    """The module PIL.Image. Raises ConfigError if Pillow is not installed."""
    try:
        import PIL.Image
    except ModuleNotFoundError:
        raise ConfigError("images need Pillow, which is not installed: pip install 'reparam[vision]'") from None
    return PIL.Image


def _reason(error: Exception) -> str:
    return str(error).replace("\n", " ")[:200] or type(error).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"
