"""The service beside `predict` in one process and beside `mlflow models serve`: the same pages, one run.

Run `python -m bench.serve --pages data/sample/pages [--model DIR] [--clients 16] [--rounds 3] [--seconds 15]`. Each
client sends one page a request and waits for its answer. The three take turns; throughput is the median of the turns.
Say with numbers which machine they are of: they hold within one run only.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

import copydesk
from bench.speed.measure import alternate
from copydesk.inputs import find_pages, read_bytes
from copydesk.registry import package

_SERVICE_PORT, _MLFLOW_PORT = 18_080, 18_081
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sends, over and over."""

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
    parser.add_argument("--pages", nargs="+", default=["data/sample/pages"])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--seconds", type=float, default=15, help="of a turn")
    options = parser.parse_args()
    sources = [path for path in find_pages(options.pages) if isinstance(path, str) and ".htm" in path]
    pages = [read_bytes(path, max_bytes=2**22).decode("utf-8", "replace") for path in sources]
    seconds, clients = options.seconds, options.clients
    desk = copydesk.load(options.model)
    desk.predict(pages[:2])
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(started(options.model, pages)) for started in (service, mlflow_server))
        turns = alternate(
            {
                "`predict` in one process": lambda: in_process(desk, pages, seconds=seconds),
                "`copydesk serve`": lambda: measure(ours, port=_SERVICE_PORT, clients=clients, seconds=seconds),
                "`mlflow models serve`": lambda: measure(theirs, port=_MLFLOW_PORT, clients=clients, seconds=seconds),
            },
            repeats=options.rounds,
        )
    results = {name: joined(results) for name, results in turns.items()}
    print(f"{len(pages)} pages, {clients} clients, {options.rounds} times {seconds:g} s each, {os.cpu_count()} cores\n")
    print("| | pages/s | p50 s | p99 s | p99 / p50 |\n|---|---|---|---|---|")
    for name, result in results.items():
        print(row(name, result))
    alone, served, mlflow = results.values()
    p50, p99 = np.percentile(served.seconds, [50, 99])
    print(
        f"\nof predict: {served.throughput / alone.throughput:.0%} (goal 90 %); of mlflow: "
        f"{served.throughput / mlflow.throughput:.2f} times (goal 2); p99 / p50: {p99 / p50:.1f} (goal 4)"
    )


def joined(turns: Sequence[Result]) -> Result:
    """Return the turns of one side as one result."""
    throughput = float(np.median([turn.throughput for turn in turns]))
    return Result(throughput, np.concatenate([turn.seconds for turn in turns]))


def in_process(desk: copydesk.Predictor, pages: Sequence[str], *, seconds: float) -> Result:
    """Measure `predict` on the pages, as often as fits."""
    began = time.monotonic()
    count = 0
    while time.monotonic() - began < seconds:
        count += len(desk.predict(pages))
    return Result(count / (time.monotonic() - began), np.zeros(0))


@contextmanager
def service(model: str, pages: Sequence[str]) -> Iterator[list[Request]]:
    """Run our service; give what to send to it."""
    command = [sys.executable, "-m", "copydesk.cli", "serve", "--model", model, "--port", str(_SERVICE_PORT)]
    with server([*command, "--log-level", "warning"], port=_SERVICE_PORT, health="/readyz"):
        yield [Request("/v1/pages", "text/html", page.encode()) for page in pages]


@contextmanager
def mlflow_server(model: str, pages: Sequence[str]) -> Iterator[list[Request]]:
    """Run MLflow's server of the same model; give what to send to it."""
    with tempfile.TemporaryDirectory() as folder:
        package(model, Path(folder) / "model", example=pages[0])
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
        command += ["-m", f"{folder}/model", "--port", str(_MLFLOW_PORT)]
        with server(command, port=_MLFLOW_PORT, health="/health"):
            yield [
                Request("/invocations", "application/json", json.dumps({"inputs": [{"html": page}]}).encode())
                for page in pages
            ]


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


def measure(requests: Sequence[Request], *, port: int, clients: int, seconds: float) -> Result:
    """Let clients send requests for a while, after a round that warms up."""
    for request in requests[:2]:
        _sender(port)(request)
    ends = time.monotonic() + seconds

    def send(number: int) -> list[float]:
        post, taken = _sender(port), []
        others = cycle([*requests[number % len(requests) :], *requests[: number % len(requests)]])
        while time.monotonic() < ends:
            began = time.monotonic()
            post(next(others))
            taken.append(time.monotonic() - began)
        return taken

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
