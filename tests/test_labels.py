import pytest

from copydesk.labels import CLASSES, HEADLINE, LABEL_OF_CLASS, SectionLabel, TopicInfo, TopicList

POLITICS = TopicInfo(id="1", slug="politics", name="politics")
DIPLOMACY = TopicInfo(id="2", slug="diplomacy", name="diplomacy", parent="1")
SUMMIT = TopicInfo(id="3", slug="summit", name="summit", parent="2")
SPORT = TopicInfo(id="4", slug="sport", name="sport")


def test_labels_stand_in_the_order_that_scores_have_everywhere():
    assert list(SectionLabel) == ["body", "boilerplate", "paywall", "sponsored"]


def test_a_headline_is_a_class_of_its_own_that_counts_as_body():
    labels = list(SectionLabel)

    assert (HEADLINE, *labels) == CLASSES
    assert [labels[i] for i in LABEL_OF_CLASS] == ["body", *labels]


def test_topics_keep_the_order_in_which_they_are_listed():
    topics = TopicList([SUMMIT, SPORT, POLITICS, DIPLOMACY])

    assert topics.slugs() == ["summit", "sport", "politics", "diplomacy"]
    assert topics.index == {"3": 0, "4": 1, "1": 2, "2": 3}
    assert len(topics) == 4


def test_ancestors_come_nearest_first_wherever_they_are_listed():
    topics = TopicList([SUMMIT, SPORT, POLITICS, DIPLOMACY])

    assert [topics.ancestors(i) for i in range(4)] == [(3, 2), (), (), (2,)]


def test_with_parents_adds_all_that_is_implied_once_and_in_list_order():
    topics = TopicList([POLITICS, DIPLOMACY, SUMMIT, SPORT])

    assert topics.with_parents(["4", "3", "2"]) == ["1", "2", "3", "4"]
    assert topics.with_parents([]) == []


def test_an_unknown_topic_is_named():
    with pytest.raises(ValueError, match=r"unknown topic '9', expected one of the 1 in the topic list"):
        TopicList([SPORT]).with_parents(["4", "9"])


@pytest.mark.parametrize("field", ["id", "slug"])
def test_an_id_or_slug_that_occurs_twice_is_refused(field):
    twin = POLITICS.model_copy(update={field: getattr(SPORT, field)})

    with pytest.raises(ValueError, match="occurs twice"):
        TopicList([SPORT, twin])


def test_a_parent_that_is_not_listed_is_named():
    with pytest.raises(ValueError, match="topic 2 names the parent 1, which is not listed"):
        TopicList([DIPLOMACY])


@pytest.mark.parametrize("parents", [{"1": "1"}, {"1": "2", "2": "1"}, {"1": "3", "2": "1", "3": "2"}])
def test_parents_that_form_a_circle_are_refused(parents):
    listed = [topic.model_copy(update={"parent": parents.get(topic.id)}) for topic in (POLITICS, DIPLOMACY, SUMMIT)]

    with pytest.raises(ValueError, match="form a circle"):
        TopicList(listed)


def test_a_topic_leading_into_a_circle_that_it_is_no_part_of_is_refused():
    circle = POLITICS.model_copy(update={"parent": "2"})

    with pytest.raises(ValueError, match="form a circle"):
        TopicList([SUMMIT, DIPLOMACY, circle])


def test_a_list_without_topics_is_a_list():
    assert len(TopicList([])) == 0


def test_a_misspelt_field_of_a_topic_is_refused():
    with pytest.raises(ValueError, match="parents"):
        TopicInfo.model_validate({"id": "1", "slug": "a", "name": "a", "parents": "2"})
