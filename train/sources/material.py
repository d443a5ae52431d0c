"""What more than one site of the newsroom corpus shows, and which sites show which of it.

Knows groups and languages; knows nothing of pages.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from train.sources.newsroom import Article, Family, Newsroom, read_folder
from train.sources.roundups import Roundup
from train.sources.tables import Table

NUM_GROUPS = 6
"""Groups of sites and families: test, validation and the other folds of the usual five take one each."""


@dataclass(frozen=True, slots=True)
class Material:
    """What more than one site shows."""

    families: list[Family]
    guides: list[Article]
    roundups: list[Roundup]
    tables: list[Table]

    def of_group(self, group: int) -> "Material":
        """Return what one group of sites shows, so that a split by group parts all but the boilerplate."""
        return Material(
            [family for i, family in enumerate(self.families) if family.label == "boilerplate" or _is_of(group, i)],
            [guide for i, guide in enumerate(self.guides) if _is_of(group, i)],
            [roundup for i, roundup in enumerate(self.roundups) if _is_of(group, i)],
            [table for i, table in enumerate(self.tables) if _is_of(group, i)],
        )

    def of_language(self, language: str) -> "Material":
        """Return what sites of one language show; `comments` and `teasers`, which have no place, templates draw."""
        families = [family for family in self.families if family.language == language and family.places]
        if language != "en":
            return Material(families, [], [], [])
        return replace(self, families=families)


def _is_of(group: int, i: int) -> bool:
    return i % NUM_GROUPS == group


def read_material(newsroom: Newsroom, folder: Path) -> Material:
    """Return all material of the corpus, which lies in a folder.

    Raises:
        NewsroomError: a file cannot be used.
    """
    roundups, tables = read_folder(folder / "roundups", Roundup), read_folder(folder / "tables", Table)
    return Material(newsroom.families, newsroom.guides, roundups, tables)
