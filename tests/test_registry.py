"""A published model can be fetched, loaded by MLflow without a pickle, and answers like the folder."""

import json
import sys
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.pyfunc.scoring_server import invocations

import copydesk
from copydesk import Document, registry
from copydesk.page import FailedPage
from copydesk.saved import read_manifest

HTML = "<h1>Talks in the news</h1><p>The minister said more.</p><aside>Subscribe to read more</aside>"
TEXT = "Match of the sport\nShare the goal"
ROWS = [{"html": HTML, "url": "https://news.example/a"}, {"text": TEXT}]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Return the working folder of a store that has the model."""
    folder = tmp_path_factory.mktemp("store")
    store = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = store.create_experiment("copydesk", artifact_location=(folder / "mlartifacts").as_uri())
    run_id = store.create_run(experiment).info.run_id
    registry.publish(tiny_model, example=HTML, store=store, run_id=run_id, register=True)
    return folder


@pytest.fixture
def in_store(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(published)


@pytest.fixture(scope="module")
def model(published: Path) -> mlflow.pyfunc.PyFuncModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{published / 'mlflow.db'}")
        return mlflow.pyfunc.load_model("models:/tiny@challenger")


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[dict]:
    documents = [Document(HTML, url="https://news.example/a", kind="html"), Document(TEXT, kind="text")]
    return [page.model_dump(mode="json") for page in copydesk.load(tiny_model).predict(documents)]


@pytest.mark.usefixtures("in_store")
def test_a_fetched_model_is_the_one_that_was_published(tiny_model: Path, tmp_path: Path):
    in_place, downloaded = (registry.fetch("models:/tiny@challenger", folder=folder) for folder in (None, tmp_path))

    assert downloaded.is_relative_to(tmp_path)
    assert read_manifest(in_place) == read_manifest(downloaded) == read_manifest(tiny_model)


@pytest.mark.usefixtures("in_store")
def test_to_fetch_runs_no_code_of_the_model(published: Path, tmp_path: Path):
    (code,) = published.glob("mlartifacts/**/pyfunc.py")
    content = code.read_text()
    code.write_text("raise SystemExit('the code of the model ran')")
    try:
        copydesk.load(registry.fetch("models:/tiny@challenger", folder=tmp_path))
    finally:
        code.write_text(content)


@pytest.mark.usefixtures("in_store")
@pytest.mark.parametrize("uri", ["models:/tiny@champion", "models:/tiny/7", "models:/other@challenger", "models:/"])
def test_an_unknown_model_is_named(uri: str):
    with pytest.raises(registry.RegistryError, match=f"{uri} cannot be fetched from sqlite:"):
        registry.fetch(uri)


def test_a_missing_store_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)

    for ask in (registry.fetch, registry.version_of):
        with pytest.raises(registry.RegistryError, match="MLFLOW_TRACKING_URI"):
            ask("models:/tiny@challenger")
        assert not list(tmp_path.iterdir())


def test_without_mlflow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mlflow.artifacts", None)

    with pytest.raises(registry.RegistryError, match=r"pip install 'copydesk\[mlflow\]'"):
        registry.fetch("models:/tiny@challenger")


@pytest.mark.parametrize("rows", [ROWS, pd.DataFrame(ROWS)], ids=["records", "data frame"])
def test_mlflow_answers_like_the_folder(model: mlflow.pyfunc.PyFuncModel, expected: list[dict], rows):
    assert model.predict(rows) == expected


@pytest.mark.parametrize(
    "request_body",
    [
        {"inputs": ROWS},
        {"inputs": {"html": [HTML, None], "text": [None, TEXT], "url": ["https://news.example/a", None]}},
        {"dataframe_records": ROWS},
        {
            "dataframe_split": {
                "columns": ["html", "text", "url"],
                "data": [[HTML, None, "https://news.example/a"], [None, TEXT, None]],
            }
        },
    ],
    ids=lambda body: next(iter(body)),
)
def test_mlflows_server_reads_requests(model: mlflow.pyfunc.PyFuncModel, expected: list[dict], request_body: dict):
    schema = model.metadata.get_input_schema()

    response = invocations(json.dumps(request_body), "application/json", model, schema)

    assert response.status == 200
    assert json.loads(response.response) == {"predictions": expected}


def test_mlflows_server_reads_columns(model: mlflow.pyfunc.PyFuncModel, expected: list[dict]):
    body = json.dumps({"inputs": {"text": [TEXT, TEXT]}})

    response = invocations(body, "application/json", model, model.metadata.get_input_schema())

    assert json.loads(response.response) == {"predictions": [expected[1]] * 2}


def test_one_kind_of_page_is_enough_for_a_request(model: mlflow.pyfunc.PyFuncModel, expected: list[dict]):
    assert model.predict([{"text": TEXT}]) == expected[1:]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"url": "https://news.example"}, "the row has neither html nor text: give either html or text"),
        ({"html": "<p>a", "text": "a"}, "the row has html and text: give either html or text"),
        ({}, "the row has neither html nor text: give either html or text"),
        ({"html": 3}, "html is int, expected a string: give it as one"),
        ({"text": "a", "url": ["b"]}, "url is list, expected a string: give it as one"),
    ],
)
def test_a_row_that_is_no_page_takes_no_other_with_it(row: dict, error: str):
    assert registry.documents_from([{"text": "a"}, row]) == [
        Document("a", kind="text"),
        FailedPage(source=None, error=error),
    ]


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA])
def test_an_empty_page_is_a_page(missing: Any):
    assert registry.documents_from([{"text": "", "html": missing}]) == [Document("", kind="text")]


DEEP = "<div>" * 10_100
BAD_ROWS = [{"html": None}, {"html": 3}, {"html": HTML, "text": TEXT}, {"html": DEEP}]


@pytest.mark.parametrize(
    "request_body",
    [
        {"inputs": [*BAD_ROWS, *ROWS]},
        {"dataframe_records": [*BAD_ROWS, *ROWS]},
        {
            "dataframe_split": {
                "columns": ["html", "text", "url"],
                "data": [[row.get(name) for name in ("html", "text", "url")] for row in [*BAD_ROWS, *ROWS]],
            }
        },
    ],
    ids=lambda body: next(iter(body)),
)
def test_mlflow_says_in_its_row_why_a_page_cannot_be_read(
    model: mlflow.pyfunc.PyFuncModel, expected: list[dict], request_body: dict
):
    response = invocations(json.dumps(request_body), "application/json", model, model.metadata.get_input_schema())

    assert response.status == 200
    *failed, first, second = json.loads(response.response)["predictions"]
    assert [first, second] == expected
    for row, words in zip(failed, ["neither html nor text", "html is ", "html and text", "10,000"], strict=True):
        assert words in row["error"]
        assert row.keys() - {"error"} == first.keys()
        assert (row["text"], row["sections"]) == ("", [])


@pytest.mark.parametrize("value", [None, 3])
def test_mlflow_makes_no_text_of_what_is_none(model: mlflow.pyfunc.PyFuncModel, value: int | None):
    (row,) = model.predict([{"html": value}])

    assert "error" in row


def test_the_requirements_can_be_had_from_an_index(tiny_model: Path):
    found = registry.requirements(tiny_model)

    assert found[0].startswith("copydesk[mlflow]")
    assert any(line.startswith("torch==") for line in found)
    assert not any("+" in line for line in found)


def test_nothing_published_is_a_pickle(published: Path):
    names = {path.name for path in published.glob("mlartifacts/**/*") if path.is_file()}

    assert "pyfunc.py" in names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".bin", ".pt"))]
