"""Tell what a page is: HTML or plain text, and in which encoding.

Knows bytes and how documents begin; knows nothing of sections.
"""

import codecs
import re
from typing import Literal

import webencodings

Kind = Literal["auto", "html", "text"]

_TAG_LIKE = re.compile(
    r"</?(?:html|head|body|div|p|span|article|section|table|ul|ol|li|br|h[1-6]|a|meta|script|main|nav|strong|em|b|i)"
    r"(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)


_DOCUMENT_TAG = re.compile(r"<(?:!doctype|/?(?:html|head|body|meta|link|script|main|nav)\b)", re.IGNORECASE)
_BLOCK_TAG = re.compile(
    r"</?(?:p|div|article|section|table|tr|td|ul|ol|li|dl|dt|dd|h[1-6]|blockquote)\b", re.IGNORECASE
)
_BLANK_LINE = re.compile(r"\n[ \t\r\f]*\n")


def detect_kind(text: str) -> Literal["html", "text"]:
    """Tell HTML from plain text: HTML begins like a document, or has at least two tags.

    Paragraphs between blank lines, most of them without a tag of a block, stay text although tags stand in them: as
    HTML they would be one.
    """
    start = text[:1_000].lstrip("\ufeff \t\r\n\f").lower()
    if start.startswith(("<!doctype html", "<html", "<head", "<body")):
        return "html"
    tags = _TAG_LIKE.finditer(text)
    if not (next(tags, None) and next(tags, None)):
        return "text"
    if _DOCUMENT_TAG.search(text):
        return "html"
    paragraphs = _BLANK_LINE.split(text.strip())
    num_blocks = sum(1 for paragraph in paragraphs if _BLOCK_TAG.search(paragraph))
    return "text" if len(paragraphs) > 2 and num_blocks < len(paragraphs) / 2 else "html"


BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_DECLARED = re.compile(rb"<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)


def decode_bytes(data: bytes) -> str:
    """Decode by byte-order mark, else as UTF-8 if it nearly is, else as declared, else as sniffed; never fail."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return without_surrogates(data[len(mark) :].decode(encoding, "replace"))
    if wide := _wide_encoding(data[:1_000]):
        return without_surrogates(data.decode(wide, "replace"))
    if b"\x1b$" in data and _declared_encoding(data) == _SEVEN_BIT:
        return data.decode(_SEVEN_BIT, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
    num_foreign = len(text) - len(text.encode("ascii", "ignore"))
    if num_foreign > 5 * text.count("\ufffd"):  # what is foreign in other encodings is hardly valid by chance
        return text
    return without_surrogates(data.decode(_declared_encoding(data) or _sniffed_encoding(data[:65_536]), "replace"))


def _wide_encoding(start: bytes) -> str | None:
    """Return UTF-16's byte order if every other byte is zero, as in Latin text without a byte-order mark."""
    num_zeros = start[::2].count(0), start[1::2].count(0)
    if len(start) < 4 or max(num_zeros) < 0.4 * len(start) or min(num_zeros) > 0:
        return None
    return "utf-16-be" if num_zeros[0] else "utf-16-le"


_SEVEN_BIT = "iso2022_jp"
"""Switched by escape sequences: all of its bytes are valid UTF-8, too."""


def _declared_encoding(data: bytes) -> str | None:
    declared = _DECLARED.search(data[:65_536])
    return _text_encoding(declared[1].decode("ascii", "replace")) if declared else None


def _text_encoding(label: str) -> str | None:
    """Return the codec of an encoding label as browsers read it; UTF-16 in a declaration is always wrong."""
    encoding = webencodings.lookup(label)
    if encoding is None or encoding.name in {"replacement", "x-user-defined"} or encoding.name.startswith("utf-16"):
        return None
    return encoding.codec_info.name


def _sniffed_encoding(data: bytes) -> str:
    from charset_normalizer import from_bytes  # slow to import, rarely needed

    guesses = list(from_bytes(data))
    if not guesses:
        return "cp1252"
    # Many single-byte encodings fit a short text: of equals the commonest one is meant.
    western = any(guess.encoding in {"cp1252", "latin_1"} and guess.chaos <= guesses[0].chaos for guess in guesses)
    return "cp1252" if western else guesses[0].encoding


_SURROGATE = re.compile("[\ud800-\udfff]")


def without_surrogates(text: str) -> str:
    """Return the text with each lone surrogate as U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)
