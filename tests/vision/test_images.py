"""Images from files and rows: what is decoded, and what is refused by name."""

import base64
import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from seeing import VISION

from reparam.errors import DataError
from reparam.images.sources import MOST_PIXELS, Source, check_header, source_of
from reparam.vision import Vision
from reparam.vision.images import decoded

PLAIN = Vision(patch=2, size=4, width=8, mean=(0.0,), std=(1.0,))


def saved(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header tells of side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_pixels_are_those_of_the_file() -> None:
    """Red, green, blue and white, upright and row by row."""
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    image = Image.new("RGB", (4, 4))
    for x in range(4):
        for y in range(4):
            image.putpixel((x, y), colors[y])
    found = decoded(saved(image), PLAIN)
    assert torch.equal(found, torch.tensor(colors).T[:, :, None].expand(3, 4, 4) / 255)


def test_an_image_keeps_its_proportions_and_is_centered_on_the_mean() -> None:
    vision = Vision(patch=2, size=8, width=8, mean=(0.5,), std=(0.25,))
    found = decoded(Image.new("RGB", (40, 20), "white"), vision)
    assert torch.equal(found[:, 2:6], torch.full((3, 4, 8), 2.0))
    assert float(found[:, :2].abs().sum() + found[:, 6:].abs().sum()) == 0  # 0 is the mean color


def test_the_orientation_of_exif_is_applied() -> None:
    image = Image.new("RGB", (4, 4), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    found = decoded(saved(image, exif=exif), PLAIN)
    assert found[0, 0].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 51, 0.2),
        ("RGBA", (0, 0, 0, 0), 1.0),
        ("P", 0, 0.0),
        ("1", 1, 1.0),
        ("I;16", 13107, 0.2),
        ("CMYK", (0,) * 4, 1.0),
    ],
)
def test_modes(mode: str, color: Any, expected: float) -> None:
    image = Image.new(mode, (4, 4), color)
    kind = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    found = decoded(saved(image, kind), PLAIN)
    assert torch.allclose(found, torch.full((3, 4, 4), expected), atol=0.01)
    gray = Vision(patch=2, size=4, width=8, channels=1, mean=(0.0,), std=(1.0,))
    assert decoded(saved(image, kind), gray).shape == (1, 4, 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF"])
def test_formats(kind: str) -> None:
    found = decoded(saved(Image.new("RGB", (4, 4), (255, 0, 0)), kind), PLAIN)
    assert torch.allclose(found, torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 4, 4), atol=0.02)


def test_what_cannot_be_decoded() -> None:
    good = saved(Image.effect_noise((64, 64), 50).convert("RGB"))
    other = saved(Image.new("RGB", (4, 4)), "PDF")
    for content, told in (
        (bomb(20_000), "a: a decompression bomb: .* pixels"),
        (bomb(10_000), f"10,000 x 10,000 pixels in .* bytes, more than {MOST_PIXELS:,}"),
        (b"not an image", "a: no image in a known format; expected PNG"),
        (b"", "no image in a known format"),
        (other, "no image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image in a known format"),
        (good[: len(good) // 2], "a: the image is damaged"),
        (good[:40], "a: "),
    ):
        with pytest.raises(DataError, match=told):
            decoded(Source("a", content=content), VISION)
    assert check_header(Source("a", content=good)) == good
    with pytest.raises(DataError, match="decompression bomb"):
        check_header(Source("a", content=bomb(10_000)))


def test_damage_gives_no_other_error() -> None:
    """Every byte of small files of each format, changed: an image or a DataError."""
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        good = bytearray(saved(Image.effect_noise((6, 6), 50).convert("RGB"), kind))
        for place in range(0, len(good), 1 + len(good) // 60):
            bad = bytearray(good)
            bad[place] ^= 0xFF
            with contextlib.suppress(DataError):
                decoded(Source("a", content=bytes(bad)), VISION)


def test_where_images_of_rows_come_from(tmp_path: Path) -> None:
    content = saved(Image.new("RGB", (4, 4), "red"))
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    folder = tmp_path / "data"
    (folder / "pictures" / "a.png").write_bytes(content)
    text = base64.b64encode(content).decode()
    for value in (
        "pictures/a.png",
        {"path": "pictures/a.png"},
        {"bytes": content, "path": None},
        {"base64": text},
        f"data:image/png;base64,{text}",
        text,
    ):
        assert source_of(value, "rows.jsonl:3", folder).read() == content
    (tmp_path / "secret.png").write_bytes(content)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    for value, told in (
        ("../secret.png", "leads out of the folder"),
        (str(tmp_path / "secret.png"), "leads out of the folder"),
        ("link.png", "leads out of the folder"),
        ("pictures/b.png", "'pictures/b.png': there is no such file below"),
        ("https://example.com/a.png", "is an address"),
        ("data:image/png,xyz", "without base64"),
        ("data:image/png;base64,@@@", "base64 of an image is damaged"),
        ("", "expected a path"),
        (7, "an image is 7"),
        ({"width": 3}, "expected a path"),
        ("x" * 5000 + "!", "no such file"),
        ("a\0b", "no such file"),
    ):
        with pytest.raises(DataError, match=r"^rows\.jsonl:3: ") as raised:
            source_of(value, "rows.jsonl:3", folder)
        assert told in str(raised.value)
        assert len(str(raised.value)) < 400
    with pytest.raises(DataError, match="only a file of rows can name paths"):
        source_of("a.png", "standard input:1", None)


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reparam.images.sources.LARGEST_FILE", 100)
    (tmp_path / "a.png").write_bytes(bytes(101))
    with pytest.raises(DataError, match=r"a\.png: a file of more than 100 bytes"):
        decoded(tmp_path / "a.png", VISION)
    with pytest.raises(DataError, match="more than 100 bytes"):
        source_of("A" * 200, "r:1", None)
    with pytest.raises(DataError, match=r"none.png: cannot be read: No such file"):
        decoded(tmp_path / "none.png", VISION)
