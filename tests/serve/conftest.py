"""What the tests of the service share: apps in memory, services in processes."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

import copydesk
from copydesk.predictor import Predictor
from copydesk.serve.app import create_app
from copydesk.serve.desk import Desk
from copydesk.serve.settings import Settings
from copydesk.split import Limits

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys, time
from copydesk.serve.server import serve
from copydesk.serve.settings import Settings
from copydesk.serve.source import ModelSource

class Slow(ModelSource):
    def load(self):
        predictor = super().load()
        read = predictor.read_batch
        def slow(batch):
            time.sleep(options["seconds_a_page"] * len(batch))
            return read(batch)
        predictor.read_batch = slow
        return predictor

options = json.loads(sys.argv[2])
model = Slow(sys.argv[1], precision="float32")  # where bfloat16 is not native it is slow
sys.exit(serve(model, Settings(**options["settings"]), host="127.0.0.1", port=0, keys=options["keys"]))
"""


@pytest.fixture(scope="session")
def predictor(tiny_model: Path) -> Predictor:
    """Load the tiny model as the service does, in float32 so that answers do not depend on their batch."""
    limits = Limits(max_bytes=100_000, max_sections=500)
    return copydesk.load(tiny_model, device="cpu", precision="float32", limits=limits)


@pytest.fixture
def client_of(predictor: Predictor) -> Iterator[Callable[..., TestClient]]:
    """Give a function that starts a service in memory: `client_of(max_pages=2, keys=["k"])`."""
    clients = []

    def start(*, keys: tuple[str, ...] = (), **settings: Any) -> TestClient:
        desk = Desk(predictor, Settings(**settings))
        client = TestClient(create_app(desk, keys=keys), raise_server_exceptions=False)
        client.desk = desk
        clients.append(client.__enter__())
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


class Service:
    """A service in a process of its own."""

    def __init__(
        self, model: Path | str, *, seconds_a_page: float = 0, keys: tuple[str, ...] = (), **settings: Any
    ) -> None:
        options = json.dumps({"seconds_a_page": seconds_a_page, "keys": keys, "settings": settings})
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error", "-c", RUN, str(model), options]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.is_ending = False
        self.logged: list[dict] = []
        self._news: Queue[dict] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = self.wait_for("ready")["port"]
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self) -> None:
        for line in self.process.stderr:
            row = json.loads(line) if line.startswith("{") else {"message": line}
            self.logged.append(row)
            self._news.put(row)

    def wait_for(self, message: str) -> dict:
        """Return the next logged line with this message."""
        while (row := self._news.get(timeout=120))["message"] != message:
            pass
        return row

    def end(self) -> None:
        """Send SIGTERM."""
        self.is_ending = True
        self.process.terminate()

    def version(self) -> str:
        """Return the version of the model that reads now."""
        return httpx2.get(f"{self.url}/v1/model", timeout=60).json()["version"]

    def stop(self) -> int:
        """End the service unless a test has begun that, and return its exit status."""
        if not self.is_ending:
            self.end()
        status = self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        self.process.stderr.close()
        return status


@pytest.fixture(scope="session")
def start_service() -> type[Service]:
    """Give the class, for services that several tests share."""
    return Service


@pytest.fixture
def service_of(tiny_model: Path) -> Iterator[Callable[..., Service]]:
    """Give a function that starts a service in a process: `service_of(timeout=2, seconds_a_page=0.1)`."""
    services = []

    def start(**options: Any) -> Service:
        services.append(Service(options.pop("model", tiny_model), **options))
        return services[-1]

    yield start
    for service in services:
        service.stop()
