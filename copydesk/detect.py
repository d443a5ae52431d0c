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


def detect_kind(text: str) -> Literal["html", "text"]:
    """Tell HTML from plain text: HTML begins like a document, or has at least two tags."""
    start = text[:1_000].lstrip("\ufeff \t\r\n\f").lower()
    if start.startswith(("<!doctype html", "<html", "<head", "<body")):
        return "html"
    tags = _TAG_LIKE.finditer(text)
    return "html" if next(tags, None) and next(tags, None) else "text"


_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_DECLARED = re.compile(rb"<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)


def decode_bytes(data: bytes) -> str:
    """Decode by byte-order mark, else as UTF-8 if valid, else as declared, else as sniffed; never fail."""
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return without_surrogates(data[len(mark) :].decode(encoding, "replace"))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    declared = _DECLARED.search(data[:4096])
    if declared and (named := _text_encoding(declared[1].decode("ascii", "replace"))):
        return without_surrogates(data.decode(named, "replace"))
    return without_surrogates(data.decode(_sniffed_encoding(data[:65_536]), "replace"))


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
