"""Round-ups of the newsroom corpus: guides whose body is names, facts, lists and tables more than running text.

Knows what is in a file and the shapes that blogs give them; knows nothing of sites or labels.
"""

from collections.abc import Callable, Iterator
from random import Random

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from train.sources.newsroom import Block


class Entry(BaseModel):
    """One thing that a round-up speaks of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    best_for: str = ""
    text: list[str]
    facts: dict[str, str] = {}
    pros: list[str] = []
    cons: list[str] = []


class Question(BaseModel):
    """A question with its answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    q: str
    a: str


class Roundup(BaseModel):
    """A file of the corpus."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    subject: str
    title: str
    intro: list[str]
    entries: list[Entry]
    faq: list[Question]
    closing: list[str]


_JUDGEMENTS = (
    ("Pros", "Cons"),
    ("Pros:", "Cons:"),
    ("What we liked", "What we did not"),
    ("For", "Against"),
    ("Reasons to buy", "Reasons to avoid"),
    ("The good", "The bad"),
    ("Strengths", "Weaknesses"),
)


def blocks_of_roundup(roundup: Roundup, random: Random) -> list[Block]:
    """Return a round-up as blocks: some of its entries, all in one of the shapes that such guides take."""
    entries = random.sample(roundup.entries, random.randint(min(4, len(roundup.entries)), len(roundup.entries)))
    shape = _Shape(random)
    table = [_table(entries)] if entries[0].facts and random.random() < 0.5 else []
    above = random.random() < 0.5
    blocks = [Block.heading(roundup.title), *map(Block.paragraph, roundup.intro), *(table if above else ())]
    if random.random() < 0.4:
        blocks.append(Block.bullets(shape.listed(entry) for entry in entries))
    for number, entry in enumerate(entries, 1):
        blocks += shape.entry(entry, number)
    blocks += () if above else table
    if random.random() < 0.6:
        blocks.append(
            Block.heading(random.choice(["Frequently asked questions", "FAQ", "Your questions", "Questions"]))
        )
        blocks += [block for item in roundup.faq for block in (shape.label(item.q), Block.paragraph(item.a))]
    return blocks + [Block.paragraph(text) for text in roundup.closing]


def _table(entries: list[Entry]) -> Block:
    head = ["", *entries[0].facts]
    return Block.table([head, *([entry.name, *(entry.facts.get(key, "–") for key in head[1:])] for entry in entries)])


class _Shape:
    """What all entries of one page look like."""

    def __init__(self, random: Random) -> None:
        self.numbered = random.random() < 0.4
        self.best_for_in_name = random.random() < 0.5
        labels: list[Callable[[str], Block]] = [Block.heading, Block.strong, Block.paragraph]
        self.label = random.choice(labels)
        self.judgements = random.choice(_JUDGEMENTS)
        self.facts_first = random.random() < 0.5
        self.facts = random.choice([self._as_list, self._as_lines, self._as_pairs, self._as_line, self._as_table])

    def listed(self, entry: Entry) -> str:
        return f"{entry.best_for}: {entry.name}" if entry.best_for else entry.name

    def entry(self, entry: Entry, number: int) -> Iterator[Block]:
        name = f"{number}. {entry.name}" if self.numbered else entry.name
        together = self.best_for_in_name and entry.best_for
        yield Block.heading(f"{name} – {entry.best_for}" if together else name)
        if entry.best_for and not together:
            yield Block.strong(entry.best_for)
        facts = list(self.facts(entry.facts)) if entry.facts else []
        yield from facts if self.facts_first else ()
        yield from map(Block.paragraph, entry.text)
        for label, items in zip(self.judgements, (entry.pros, entry.cons), strict=True):
            if items:
                yield self.label(label)
                yield Block.bullets(items)
        yield from () if self.facts_first else facts

    @staticmethod
    def _as_list(facts: dict[str, str]) -> list[Block]:
        return [Block.bullets(f"{key}: {value}" for key, value in facts.items())]

    @staticmethod
    def _as_lines(facts: dict[str, str]) -> list[Block]:
        return [Block("p", html=Markup("<strong>{}:</strong> {}").format(*fact)) for fact in facts.items()]

    @staticmethod
    def _as_pairs(facts: dict[str, str]) -> list[Block]:
        return [block for key, value in facts.items() for block in (Block.strong(key), Block.paragraph(value))]

    @staticmethod
    def _as_line(facts: dict[str, str]) -> list[Block]:
        return [Block.paragraph(" | ".join(f"{key}: {value}" for key, value in facts.items()))]

    @staticmethod
    def _as_table(facts: dict[str, str]) -> list[Block]:
        return [Block.table(facts.items())]
