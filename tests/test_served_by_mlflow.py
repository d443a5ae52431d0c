"""MLflow's own server, as a user starts it, answers with what `copydesk predict` says."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient

from copydesk import registry
from train.wheel import build_wheel

ROOT = Path(__file__).parents[1]
HTML = "<h1>Talks in the news</h1><p>The minister said more.</p><aside>Subscribe to read more</aside>"
TEXT = "Match of the sport\nShare the goal"
COMMANDS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Return the working folder of a store that has the model, with its wheel."""
    folder = tmp_path_factory.mktemp("served")
    store = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = store.create_experiment("copydesk", artifact_location=(folder / "mlartifacts").as_uri())
    run_id = store.create_run(experiment).info.run_id
    wheel = build_wheel(folder / "built")
    registry.publish(tiny_model, example=HTML, store=store, run_id=run_id, register=True, wheel=wheel)
    return folder


@pytest.fixture(scope="module")
def environment(store: Path) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{COMMANDS}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{store / 'mlflow.db'}",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def address(store: Path, environment: dict[str, str]) -> Iterator[str]:
    """Serve the model until the tests are over."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["mlflow", "models", "serve", "-m", "models:/tiny@challenger", "--env-manager", "local"]
    with (store / "server.txt").open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            cwd=store,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while not answers(f"http://127.0.0.1:{port}/ping"):
            assert server.poll() is None, (store / "server.txt").read_text("utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


def predicted(folder: Path, environment: dict[str, str], *, page: str) -> dict[str, Any]:
    """Return what `copydesk predict` says of a page."""
    command = ["copydesk", "predict", "-", "--model", str(folder), "--format", "json"]
    done = subprocess.run(
        command, input=page, env=environment, cwd=folder, capture_output=True, text=True, check=True, timeout=300
    )
    (read,) = json.loads(done.stdout)
    return read


def labels_and_offsets(page: dict[str, Any]) -> list[tuple]:
    return [(part["start"], part["end"], part["label"], part["role"], part["text"]) for part in page["sections"]]


def test_the_server_says_what_the_command_line_says(address: str, environment: dict[str, str], tiny_model: Path):
    body = {"inputs": [{"html": HTML}, {"text": TEXT}]}
    response = requests.post(f"{address}/invocations", json=body, timeout=300)
    assert response.ok, response.text
    pages = response.json()["predictions"]

    expected = [predicted(tiny_model, environment, page=page) for page in (HTML, TEXT)]
    assert len(pages) == 2
    for page, wanted in zip(pages, expected, strict=True):
        assert page.keys() == wanted.keys()
        assert page["text"] == wanted["text"]
        assert page["headline"] == wanted["headline"]
        assert labels_and_offsets(page) == labels_and_offsets(wanted)
        for part, other in zip(page["sections"], wanted["sections"], strict=True):
            assert part["scores"] == pytest.approx(other["scores"], abs=0.005)
        assert [topic["id"] for topic in page["topics"]] == [topic["id"] for topic in wanted["topics"]]
        assert page["model"] == wanted["model"]


def test_what_is_no_page_is_said_in_its_row(address: str):
    body = {"inputs": [{"html": None}, {"html": 3}, {"text": TEXT}]}

    response = requests.post(f"{address}/invocations", json=body, timeout=300)

    assert response.ok, response.text
    assert [page["text"] for page in response.json()["predictions"]] == ["", "", TEXT]
    assert ["error" in page for page in response.json()["predictions"]] == [True, True, False]


def test_the_model_carries_the_wheel_that_it_requires(store: Path):
    (requirements,) = store.glob("mlartifacts/**/requirements.txt")
    first, *others = requirements.read_text("utf-8").splitlines()

    wheel = requirements.parent / first
    assert wheel.name.startswith("copydesk-")
    assert any(line.startswith("torch==") for line in others)
    with zipfile.ZipFile(wheel) as content:
        for path in (ROOT / "copydesk").glob("*.py"):
            assert content.read(f"copydesk/{path.name}") == path.read_bytes()
