"""Data tables of the newsroom corpus: rankings, series, schedules, whose body is hundreds of short cells.

Knows what is in a file and the shapes that pages give them; knows nothing of sites or labels.
"""

from collections.abc import Iterator
from datetime import date
from random import Random
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from train.sources.newsroom import Block


class Column(BaseModel):
    """What one column shows: a number in a range, or one of some texts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float = 0
    high: float = 100
    show: str = "{:.0f}"
    """As `str.format` takes it."""
    choices: list[str] = []

    @model_validator(mode="after")
    def _can_be_shown(self) -> "Column":
        try:
            self.cell(Random(0))  # noqa: S311 (to see that it can be)
        except (IndexError, KeyError) as error:
            raise ValueError(f"show is {self.show!r}, expected one number, as `str.format` takes it") from error
        return self

    def cell(self, random: Random) -> str:
        """Return the text of one cell."""
        return random.choice(self.choices) if self.choices else self.show.format(random.uniform(self.low, self.high))


class Table(BaseModel):
    """A file of the corpus. A row bears a month, or a name joined from a first and a second part."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    subject: str
    titles: list[str] = Field(min_length=1)
    intro: list[str]
    head: str
    first: list[str] = []
    second: list[str] = [""]
    months: bool = False
    ranked: bool = False
    count: Annotated[list[int], Field(min_length=2, max_length=2)]
    columns: dict[str, Column]
    notes: list[str] = []

    @model_validator(mode="after")
    def _has_rows(self) -> "Table":
        if self.count[0] > self.count[1]:
            raise ValueError(f"count is {self.count}, expected the least number of rows, then the most")
        if not self.months and not self.first:
            raise ValueError("it has neither months nor first, expected one of them: what a row is called")
        return self


MAX_CELLS = 600
"""Of one table, ranks and repeated heads not counted."""
_MONTHS = ("{:%m/%d/%Y}", "{:%b %Y}", "{:%B %Y}", "{:%Y-%m}", "{:%d.%m.%Y}")


def blocks_of_table(table: Table, random: Random) -> list[Block]:
    """Return a table as blocks: its own rows and numbers, in one of the shapes that pages give them."""
    columns = random.sample(list(table.columns), random.randint(min(2, len(table.columns)), len(table.columns)))
    names = _names(table, random)[: MAX_CELLS // (1 + len(columns))]
    rows = [[name, *(table.columns[column].cell(random) for column in columns)] for name in names]
    head = [table.head, *columns]
    if table.ranked and random.random() < 0.5:
        rows, head = [[str(rank), *row] for rank, row in enumerate(rows, 1)], ["Rank", *head]
    elif table.ranked:
        rows = [[f"{rank}. {row[0]}", *row[1:]] for rank, row in enumerate(rows, 1)]
    shape = random.choice([_cells, _cells, _cells, _lines, _pairs, _items])
    intro = random.sample(table.intro, min(random.randint(0, 2), len(table.intro)))
    notes = random.sample(table.notes, min(random.randint(0, 1), len(table.notes)))
    title = Block.heading(random.choice(table.titles))
    return [title, *map(Block.paragraph, intro), *shape(head, rows), *map(Block.paragraph, notes)]


def _names(table: Table, random: Random) -> list[str]:
    count = random.randint(*table.count)
    if table.months:
        start, written = random.randrange(1990 * 12, 2022 * 12), random.choice(_MONTHS)
        return [written.format(date(month // 12, month % 12 + 1, 1)) for month in range(start, start + count)]
    names = [first + second for first in table.first for second in table.second]
    return random.sample(names, min(count, len(names)))


def _cells(head: list[str], rows: list[list[str]]) -> Iterator[Block]:
    yield Block.table([head, *rows])


def _lines(head: list[str], rows: list[list[str]]) -> Iterator[Block]:
    for row in rows:
        yield Block.strong(row[0])
        yield Block.bullets(f"{key}: {cell}" for key, cell in zip(head[1:], row[1:], strict=True))


def _pairs(head: list[str], rows: list[list[str]]) -> Iterator[Block]:
    for row in rows:
        yield Block.strong(row[0])
        for key, cell in zip(head[1:], row[1:], strict=True):
            yield Block.paragraph(key)
            yield Block.paragraph(cell)


def _items(_: list[str], rows: list[list[str]]) -> Iterator[Block]:
    yield Block.bullets(" – ".join(row) for row in rows)
