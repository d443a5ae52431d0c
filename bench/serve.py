"""The service beside `predict` in one process and beside `mlflow models serve`: the same pages, one run.

Run `python -m bench.serve [--model DIR] [--clients 16] [--rounds 3] [--pages 96]`. Each client sends one page a
request and waits for its answer. The three take turns, each with pages that it has not read before, for vectors of
sections that come again are remembered. Throughput is the median of the turns. Say with numbers which machine they are
of: they hold within one run only.
"""

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import copydesk
from bench.speed.measure import alternate
from bench.speed.pages import read_pages
from copydesk.registry import package

_SERVICE_PORT, _MLFLOW_PORT = 18_080, 18_081
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sends."""

    path: str
    kind: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """Pages a second, and the time of single requests in seconds."""

    throughput: float
    seconds: np.ndarray


def row(name: str, result: Result) -> str:
    """Return a row of a Markdown table."""
    if not len(result.seconds):
        return f"| {name} | {result.throughput:.2f} | | | |"
    p50, p99 = np.percentile(result.seconds, [50, 99])
    return f"| {name} | {result.throughput:.2f} | {p50:.3f} | {p99:.3f} | {p99 / p50:.1f} |"


def main() -> None:
    """Print a table of all three, and whether the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/released")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--pages", type=int, default=96, help="of a turn")
    options = parser.parse_args()
    count, clients = options.pages, options.clients
    pages = [page.content for page in read_pages(count * options.rounds + 2)]
    warming, pages = pages[:2], pages[2:]
    desk = copydesk.load(options.model)
    desk.predict(warming)
    with ExitStack() as stack:
        stack.enter_context(service(options.model))
        stack.enter_context(mlflow_server(options.model, example=warming[0]))

        def served(pages: Sequence[str]) -> Result:
            return measure(map(to_service, pages), port=_SERVICE_PORT, clients=clients)

        def invoked(pages: Sequence[str]) -> Result:
            return measure(map(to_mlflow, pages), port=_MLFLOW_PORT, clients=clients)

        served(warming)
        invoked(warming)
        parts = [pages[i : i + count] for i in range(0, len(pages), count)]
        for_predict, for_service, for_mlflow = iter(parts), iter(parts), iter(parts)
        turns = alternate(
            {
                "`predict` in one process": lambda: in_process(desk, next(for_predict)),
                "`copydesk serve`": lambda: served(next(for_service)),
                "`mlflow models serve`": lambda: invoked(next(for_mlflow)),
            },
            repeats=options.rounds,
        )
    results = {name: joined(results) for name, results in turns.items()}
    print(f"{options.rounds} times {count} pages, {clients} clients, {os.cpu_count()} cores\n")
    print("| | pages/s | p50 s | p99 s | p99 / p50 |\n|---|---|---|---|---|")
    for name, result in results.items():
        print(row(name, result))
    alone, ours, theirs = results.values()
    p50, p99 = np.percentile(ours.seconds, [50, 99])
    print(
        f"\nof predict: {ours.throughput / alone.throughput:.0%} (goal 90 %); of mlflow: "
        f"{ours.throughput / theirs.throughput:.2f} times (goal 2); p99 / p50: {p99 / p50:.1f} (goal 4)"
    )


def joined(turns: Sequence[Result]) -> Result:
    """Return the turns of one side as one result."""
    throughput = float(np.median([turn.throughput for turn in turns]))
    return Result(throughput, np.concatenate([turn.seconds for turn in turns]))


def in_process(desk: copydesk.Predictor, pages: Sequence[str]) -> Result:
    """Measure `predict` on pages."""
    began = time.monotonic()
    desk.predict(pages)
    return Result(len(pages) / (time.monotonic() - began), np.zeros(0))


def service(model: str) -> AbstractContextManager[None]:
    """Run our service."""
    command = [sys.executable, "-m", "copydesk.cli", "serve", "--model", model, "--port", str(_SERVICE_PORT)]
    return server([*command, "--log-level", "warning"], port=_SERVICE_PORT, health="/readyz")


def to_service(page: str) -> Request:
    """Return the request that our service answers."""
    return Request("/v1/pages", "text/html", page.encode())


@contextmanager
def mlflow_server(model: str, *, example: str) -> Iterator[None]:
    """Run MLflow's server of the same model."""
    with tempfile.TemporaryDirectory() as folder:
        package(model, Path(folder) / "model", example=example)
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
        command += ["-m", f"{folder}/model", "--port", str(_MLFLOW_PORT)]
        with server(command, port=_MLFLOW_PORT, health="/health"):
            yield


def to_mlflow(page: str) -> Request:
    """Return the request that MLflow's server answers."""
    return Request("/invocations", "application/json", json.dumps({"inputs": [{"html": page}]}).encode())


@contextmanager
def server(command: Sequence[str], *, port: int, health: str) -> Iterator[None]:
    """Run a server until the context ends; give it when it answers.

    Raises:
        RuntimeError: it ends by itself, or does not answer for two minutes.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(  # noqa: S603 (a command of ours)
            command, stdout=output, stderr=output, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 120
            while not _answers(port, health):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise RuntimeError(f"{' '.join(command)} does not answer: {output.read().decode()[-2_000:]}")
                time.sleep(0.2)
            yield
        finally:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, signal.SIGTERM)  # mlflow's server is a child of its command
            process.wait(timeout=60)


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(_LOOPBACK, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def measure(requests: Iterable[Request], *, port: int, clients: int) -> Result:
    """Let clients send requests, each the next one as soon as it has an answer."""
    waiting = deque(requests)

    def send(_: int) -> list[float]:
        post = _sender(port)
        taken: list[float] = []
        while True:
            try:
                request = waiting.popleft()
            except IndexError:  # none is left
                return taken
            began = time.monotonic()
            post(request)
            taken.append(time.monotonic() - began)

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        taken = [one for all_of_one in pool.map(send, range(clients)) for one in all_of_one]
    return Result(len(taken) / (time.monotonic() - began), np.array(taken))


def _sender(port: int) -> Callable[[Request], None]:
    connection = http.client.HTTPConnection(_LOOPBACK, port, timeout=300)

    def post(request: Request) -> None:
        connection.request("POST", request.path, request.body, {"content-type": request.kind})
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{request.path} answers {response.status}: {content[:300].decode()}")

    return post


if __name__ == "__main__":
    main()
