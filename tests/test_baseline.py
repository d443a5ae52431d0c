"""The baseline fits what there is to learn from, and says what is missing."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from copydesk.predictor import Document
from train import fit as stage
from train.arguments import load_experiment
from train.baseline import MODEL, BaselinePredictor, fit, save
from train.config import Experiment
from train.sources.articles import read_topics

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def experiment() -> Experiment:
    experiment = load_experiment("tiny.yaml", ["fit={kind: baseline}"])
    experiment.fitted.mkdir(parents=True)
    return experiment


def keep(file: Path, *, rows: int | None = None, topics_known: bool | None = None) -> None:
    table = pa.parquet.read_table(file).slice(0, rows)
    if topics_known is not None:
        place = table.schema.get_field_index("topics_known")
        table = table.set_column(place, "topics_known", pa.array([topics_known] * len(table)))
    pa.parquet.write_table(table, file)


def test_without_a_judged_article_no_topic_is_learnt_and_pages_are_read(experiment):
    for split in ("train", "validation"):
        keep(experiment.prepared / "articles" / f"{split}.parquet", rows=0)
        keep(experiment.prepared / "pages" / f"{split}.parquet", topics_known=False)

    fit(experiment)

    topics = read_topics(experiment.prepare.topics)
    settings = {"thresholds": [0.5] * len(topics), "temperatures": (1.0, 1.0), "name": "tiny", "card": ""}
    save(Path("released"), fitted=experiment.fitted, topics=topics, **settings)
    desk = BaselinePredictor(Path("released"))
    assert (experiment.fitted / MODEL).is_file()
    assert desk.model.topics == [None] * len(topics)
    assert np.all(desk.model.topic_logits(["Mayor wins"]) == -30)
    (page,) = desk.predict([Document("<p>He won by two.")])
    assert page.topics == []


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_pages_is_refused(experiment, split):
    keep(experiment.prepared / "pages" / f"{split}.parquet", rows=0)

    with pytest.raises(ValueError, match=f"has no {split} pages, expected some of each split"):
        stage.fit(experiment)
