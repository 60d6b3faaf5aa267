"""Parts of messages: numbers with their nouns, and text of unknown origin without control characters."""

from __future__ import annotations

UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how such a file begins
_KEPT = "\n\t"
# Besides the control characters, these change the order in which a terminal or an editor shows what follows.
_BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, in the singular or plural.

    >>> counted(1, "row"), counted(1200, "row"), counted(2, "matrix", "matrices")
    ('1 row', '1,200 rows', '2 matrices')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def sized(size: float) -> str:
    """A number of bytes with a unit.

    >>> sized(1000), sized(3 << 20)
    ('1000 bytes', '3 MiB')
    """
    for name in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {name}"
        size /= 1024
    return f"{size:,.1f} GiB"


def not_utf8(error: UnicodeDecodeError, offset: int = 0) -> str:
    """What is wrong with bytes that are not UTF-8; they begin at this offset of their file.

    >>> try:
    ...     b"caf\\xe9".decode()
    ... except UnicodeDecodeError as error:
    ...     not_utf8(error)
    'byte 0xe9 at offset 3 is not UTF-8'
    """
    if offset == 0 and error.object.startswith(UTF_16):
        return "the file is UTF-16; save it as UTF-8"
    return f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start:,} is not UTF-8"


def visible(text: str) -> str:
    """The text with control characters, but for newlines and tabs, replaced by symbols or escape sequences.

    Names in files, paths and generated text may hold sequences that move the cursor or change the terminal's settings;
    some also cannot be encoded.

    >>> visible("a\\tb\\x1b[31m\\x9b2J\\udcff")
    'a\\tb␛[31m\\\\x9b2J\\\\udcff'
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def symbol(character: str) -> str:
    """The symbol or escape sequence for a character that cannot be shown."""
    if character == "\x7f":
        return "␡"
    return chr(0x2400 + ord(character)) if ord(character) < 0x20 else character.encode("unicode_escape").decode()


def _shown(character: str) -> str:
    code = ord(character)
    control = code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or 0x2028 <= code <= 0x2029
    return symbol(character) if (control or character in _BIDIRECTIONAL) and character not in _KEPT else character
