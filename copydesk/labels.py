"""The vocabulary of labels: section labels and topics.

The only place where label order is decided. Knows names and hierarchy; knows nothing of text, tensors or files.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class SectionLabel(StrEnum):
    """What a section is. The order is that of `scores` everywhere."""

    BODY = "body"
    BOILERPLATE = "boilerplate"
    PAYWALL = "paywall"
    SPONSORED = "sponsored"


HEADLINE = "headline"
"""The fifth class of the network and of annotations; in the output it is `body` with this role."""

CLASSES: tuple[str, ...] = (HEADLINE, *SectionLabel)
"""The classes of the section head, in the order of its logits."""

LABEL_OF_CLASS: tuple[int, ...] = (0, *range(len(SectionLabel)))
"""For each class, the index of the public label that it counts as."""


class TopicInfo(BaseModel):
    """One topic a model can assign, as `data/topics.yaml` lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    """Code in its scheme, e.g. `medtop:20000638`."""
    slug: str
    """Short name for metrics and figures."""
    name: str
    parent: str | None = None
    """Id of the broader topic, which this one implies."""
    definition: str = ""


class TopicList:
    """The topics of a model, in the order of its topic logits."""

    def __init__(self, topics: Iterable[TopicInfo]) -> None:
        """Check and index the topics.

        Raises:
            ValueError: an id or slug occurs twice, a parent is not listed, or parents form a circle.
        """
        self.topics: tuple[TopicInfo, ...] = tuple(topics)
        self.index: dict[str, int] = {topic.id: i for i, topic in enumerate(self.topics)}
        slugs = {topic.slug for topic in self.topics}
        if len(self.index) != len(self.topics) or len(slugs) != len(self.topics):
            raise ValueError("a topic id or slug occurs twice in the topic list: give each topic its own")
        for topic in self.topics:
            if topic.parent is not None and topic.parent not in self.index:
                raise ValueError(
                    f"topic {topic.id} names the parent {topic.parent}, which is not listed: list it, or drop `parent`"
                )
        self._ancestors = tuple(self._climb(i) for i in range(len(self.topics)))

    def _climb(self, index: int) -> tuple[int, ...]:
        found: list[int] = []
        parent = self.topics[index].parent
        while parent is not None:
            position = self.index[parent]
            if position in found or position == index:
                raise ValueError(f"the parents of topic {self.topics[index].id} form a circle: break it")
            found.append(position)
            parent = self.topics[position].parent
        return tuple(found)

    def __len__(self) -> int:
        return len(self.topics)

    def ancestors(self, index: int) -> tuple[int, ...]:
        """Return the indices of all broader topics, nearest first."""
        return self._ancestors[index]

    def with_parents(self, ids: Iterable[str]) -> list[str]:
        """Return the ids and all that they imply, in list order.

        Raises:
            ValueError: an id is not listed.
        """
        found: set[int] = set()
        for topic_id in ids:
            if topic_id not in self.index:
                raise ValueError(
                    f"unknown topic {topic_id!r}, expected one of the {len(self)} in the topic list: "
                    "correct it, or add the topic"
                )
            found.update((self.index[topic_id], *self.ancestors(self.index[topic_id])))
        return [self.topics[i].id for i in sorted(found)]

    def slugs(self) -> Sequence[str]:
        """Return the slugs in list order."""
        return [topic.slug for topic in self.topics]
