"""Show pages and models to people: colours, widths, and nothing that a page could do to a terminal.

Knows Rich and the output schema; knows nothing of options, files or predictors.
"""

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from copydesk.page import FailedPage, Page, Topic

LABEL_STYLES = {
    "headline": "bold green",
    "body": "green",
    "boilerplate": "dim",
    "paywall": "magenta",
    "sponsored": "dark_orange3",
}
"""Legible on a light and on a dark ground, in sixteen colours too."""
_TEXT_STYLES = LABEL_STYLES | {"headline": "bold", "body": ""}

_MARGIN = 13
"""Columns for the label's name."""
_WIDEST = 100
"""Columns beyond which a line is hard to read."""

_ENCODER_FACTS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
"""What is shown of the section encoder's config; all of it stands in the JSON."""

# Escape sequences begin with a control character of either set; the others reorder what is read (CVE-2021-42574).
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return text on one line, with nothing in it that a terminal would obey."""
    return UNPRINTABLE.sub("\ufffd", " ".join(text.split()))


def show_pages(rows: Iterable[Page | FailedPage], console: Console) -> None:
    """Show pages one after the other, with a legend above them; plain and unwrapped where nobody watches."""
    if console.is_terminal:
        legend = ((f"  {label}", style) for label, style in LABEL_STYLES.items())
        console.print(Text.assemble((f"{'labels':<{_MARGIN - 2}}", "dim"), *legend))
    for row in rows:
        console.print()
        if isinstance(row, Page):
            _show_page(row, console)
        else:
            failure = Text.assemble((printable(row.source or "page"), "bold"), f": {printable(row.error)}")
            failure.stylize("red")
            _hang("failed", failure, "bold red", console)


def _show_page(page: Page, console: Console) -> None:
    _hang("page", Text(printable(page.source or "without a name"), "bold"), "dim", console)
    for section in page.sections:
        label = section.role or section.label
        _hang(label, Text(printable(section.text), _TEXT_STYLES[label]), LABEL_STYLES[label], console)
    if not page.sections:
        console.print(Text("no text on this page", "dim"))
    console.print()
    for i, topic in enumerate(page.topics):
        _hang("" if i else "topics", _topic(topic), "bold", console)
    if not page.topics:
        _hang("topics", Text("none", "dim"), "bold", console)


def _topic(topic: Topic) -> Text:
    return Text.assemble(
        f"{topic.score:.2f}  {printable(topic.name)}",
        (f"  {printable(topic.id)}", "dim"),
        ("  implied by a narrower topic" if topic.implied else "", "dim italic"),
    )


def _hang(name: str, text: Text, style: str, console: Console) -> None:
    """Print text beside a name in the margin, wrapped in a terminal only: `grep` wants whole lines."""
    lines = [text]
    if console.is_terminal:
        lines = list(text.wrap(console, max(20, min(console.width, _WIDEST) - _MARGIN)))
    for i, line in enumerate(lines):
        line.rstrip()
        console.print(Text.assemble((f"{'' if i else name:<{_MARGIN}}", style), line), soft_wrap=True)


def show_facts(facts: dict[str, Any], console: Console) -> None:
    """Show what a model is, as `copydesk info --json` gives it."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    encoder = facts["network"]["encoder"]
    shown = facts | {
        "network": {name: value for name, value in facts["network"].items() if name != "encoder"},
        "encoder": {name: encoder[name] for name in _ENCODER_FACTS if name in encoder},
        "files": {
            name: f"({megabytes(file['bytes'])}, {file['sha256'][:12]})" for name, file in facts["files"].items()
        },
    }
    for name, value in shown.items():
        if name != "topics":
            grid.add_row(name.replace("_", " "), _written(value))
    console.print(grid)
    table = Table("topic", "name", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("threshold", justify="right")
    parents = {topic["id"]: topic["parent"] for topic in facts["topics"]}
    for topic in facts["topics"]:
        depth, parent = 0, topic["parent"]
        while parent is not None and depth < len(parents):
            depth, parent = depth + 1, parents.get(parent)
        name = "  " * depth + printable(topic["name"])
        table.add_row(Text(printable(topic["id"])), Text(name), f"{topic['threshold']:.3f}")
    console.print()
    console.print(table)


def megabytes(size: int) -> str:
    """Write a number of bytes for people."""
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size:,} bytes"


def _written(value: Any) -> Text:
    if isinstance(value, dict):
        return Text(", ".join(f"{printable(str(key))} {_written(item)}" for key, item in value.items()) or "none")
    if isinstance(value, list):
        return Text(", ".join(printable(str(item)) for item in value))
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    return Text("none" if value is None else printable(str(value)))
