import codecs

import pytest

from copydesk.detect import decode_bytes, detect_kind
from copydesk.split import split


@pytest.mark.parametrize(
    "source",
    [
        "<!DOCTYPE html>a",
        "\ufeff \n<!doctype HTML>",
        "<html lang=de>",
        "<HEAD>",
        "<body>a",
        "<p>a</p>",
        "a<br/>b<BR>c",
        "<?xml version='1.0'?><!-- x --><html><body>a",
        "<a href='x'>a</a>",
        "<p>a</p>\n\n<p>b</p>\n\n<p>c</p>",
        "<div>a\n\nb <b>c</b></div>\n\n<div>d</div>",
        "<!-- saved -->\n\n<script>a()\n\nb()\n\nc()</script>\n\n<body>a",
        "a<br>\n\nb<br>",
    ],
)
def test_html_is_recognised(source):
    assert detect_kind(source) == "html"


@pytest.mark.parametrize(
    "source",
    [
        *(
            "",
            " ",
            "a",
            "a < b > c",
            "one <p> only",
            "<https://example.org> <me@example.org>",
            "if a<b and c>d: <pre-x>",
        ),
        "<placeholder> and <another>",
        "Ferry sails\n\nIt sailed on <b>Monday</b>.<br>\nIt rained.\n\nTom Pike waved.",
        "How to link\n\nUse <a>.\n\nThen </a>, and in a <p> as well.\n\nThat is all.",
    ],
)
def test_text_is_recognised(source):
    assert detect_kind(source) == "text"


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_a_byte_order_mark_beats_a_declaration(mark, encoding):
    source = "<meta charset='koi8-r'><p>Größe 日本</p><p>😀</p>"

    page = split(mark + source.encode(encoding))

    assert page.texts() == ["Größe 日本", "😀"]
    assert decode_bytes(mark + source.encode(encoding)) == source


def test_valid_utf8_beats_a_wrong_declaration():
    assert split("<meta charset='iso-8859-1'><p>Größe</p>".encode()).texts() == ["Größe"]


@pytest.mark.parametrize("head", ["", "<meta charset='iso-8859-1'>", f"<!-- {'x' * 5_000} --><meta charset='utf-8'>"])
@pytest.mark.parametrize("broken", [b"\xe2\x80", b"\xff"], ids=["cut short", "one byte"])
def test_a_broken_byte_of_utf8_costs_itself_alone(head, broken):
    source = f"<html>{head}<p>Größe der Fähre über dem Fjord für Gäste, ” sagt Zoë</p><p>".encode()

    assert split(source + broken).texts() == ["Größe der Fähre über dem Fjord für Gäste, ” sagt Zoë", "\ufffd"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_latin_utf16_is_known_without_a_byte_order_mark(encoding):
    assert decode_bytes("The night ferry sails, said Zoë.".encode(encoding)) == "The night ferry sails, said Zoë."


@pytest.mark.parametrize("data", [b"", b"\0", b"a\0", b"a\0\0\0b", "a\ufffd".encode()])
def test_a_zero_byte_alone_is_no_utf16(data):
    assert decode_bytes(data) == data.decode()


def test_escape_sequences_are_read_as_declared():
    source = "<html><meta charset='iso-2022-jp'><p>日本の新聞</p>"

    assert split(source.encode("iso-2022-jp")).texts() == ["日本の新聞"]


@pytest.mark.parametrize(
    ("label", "encoding", "text"),
    [
        ("windows-1251", "cp1251", "Привет, мир"),
        ("shift_jis", "shift_jis", "日本の新聞"),
        ("iso-8859-1", "cp1252", "“Größe” – 5 €"),
        ("us-ascii", "cp1252", "“Größe”"),
        ("GBK", "gbk", "中国新闻"),
        ("EUC-JP", "euc_jp", "日本の新聞"),
    ],
)
@pytest.mark.parametrize(
    "head",
    [
        '<meta charset="{}">',
        "<META content='text/html; charset={}' http-equiv=Content-Type>",
        "<?xml version='1.0' encoding='{}'?>",
    ],
)
def test_a_declared_encoding_is_believed(head, label, encoding, text):
    data = f"{head.format(label)}<p>".encode() + text.encode(encoding) + b"</p><p>"

    assert split(data).texts() == [text]


@pytest.mark.parametrize(
    ("label", "encoding", "text"),
    [
        ("gb2312", "gbk", "朱镕基"),
        ("shift_jis", "cp932", "①髙橋"),
        ("euc-kr", "cp949", "똠방각하"),
        ("iso-8859-9", "cp1254", "“İstanbul”"),
    ],
)
def test_a_declared_label_means_what_browsers_take_it_for(label, encoding, text):
    """The HTML standard's labels (encoding.spec.whatwg.org) are wider than Python's codecs of the same names."""
    data = f"<html><meta charset={label}><p>".encode() + text.encode(encoding) + b"</p>"

    assert split(data).texts() == [text]


@pytest.mark.parametrize("label", ["utf-16", "utf-16le", "utf-32"])
def test_a_declaration_that_could_not_be_read_if_it_were_true_is_not_believed(label):
    assert split(f"<html><meta charset={label}><p>".encode() + b"to be \xff</p>").text.startswith("to be ")


@pytest.mark.parametrize(
    "label",
    ["nonsense", "rot13", "base64", "x" * 500, "undefined", "..", "idna", "punycode", "unicode_escape", "utf-7"],
)
def test_a_nonsense_declaration_does_no_harm(label):
    text = "Die Größe der Straße überrascht die Läufer, und die Mädchen möchten natürlich schöne Bücher. "
    data = f"<html><meta charset={label}><p>".encode() + (text * 20).encode("latin-1") + b" \\d \\x</p>"

    assert "Läufer" in split(data).text


@pytest.mark.parametrize(
    "text",
    [
        "Die Größe der Straße überrascht die Läufer, und die Mädchen möchten natürlich schöne Bücher. ",
        "Le président a déclaré à l'Élysée que la réforme sera présentée après l'été, malgré les critiques. ",
    ],
    ids=["German", "French"],
)
def test_an_undeclared_latin_page_is_sniffed(text):
    data = f"<html><p>{text * 20}</p>".encode("latin-1")

    assert split(data).text == (text * 20).strip()
