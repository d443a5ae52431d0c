"""The service as a process: signals, clients that misbehave, load."""

import http.client
import json
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from copydesk.saved import load_saved, read_description, save_folder

PAGE = json.dumps({"text": "Minister said talks\n\nThe match today."}).encode()
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def service(tiny_model: Path, start_service) -> Iterator:
    service = start_service(tiny_model, seconds_a_page=0.02, max_waiting=64, max_connections=1_050, read_timeout=3)
    yield service
    assert service.stop() == 0


def post(service, body: bytes = PAGE, path: str = "/v1/pages", headers: dict | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    try:
        connection.request("POST", path, body, headers or JSON)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def get(service, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    try:
        return response.status, response.read()
    finally:
        connection.close()


def meter(service, name: str) -> float:
    rows = [line for line in get(service, "/metrics")[1].decode().splitlines() if line.startswith(f"{name} ")]
    return float(rows[0].split()[-1])


def eventually(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nothing_that_was_accepted_is_lost_at_sigterm(service_of):
    service = service_of(seconds_a_page=0.02)
    outcomes: Counter[str] = Counter()
    sent_before: list[bool] = []
    ended = threading.Event()

    def send_until_refused() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        while True:
            early = not ended.is_set()
            try:
                connection.request("POST", "/v1/pages", PAGE, JSON)
                response = connection.getresponse()
            except OSError:  # refused, or closed before a byte of an answer
                connection.close()
                outcomes["not accepted"] += 1
                sent_before.append(early)
                return
            assert json.loads(response.read())["text"].startswith("Minister")
            outcomes[str(response.status)] += 1

    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(send_until_refused) for _ in range(16)]
        time.sleep(1)
        ended.set()
        service.end()
        for client in clients:
            client.result()

    assert service.stop() == 0
    answered = [row for row in service.logged if row["message"] == "request"]
    assert outcomes["200"] == len(answered) > 30
    assert {row["status"] for row in answered} == {200}
    assert outcomes["not accepted"] == 16
    assert not any(sent_before)
    assert [row["lost_requests"] for row in service.logged if row["message"] == "ended"] == [0]


def test_what_takes_longer_than_the_grace_time_is_said_to_be_lost(service_of):
    service = service_of(seconds_a_page=20, grace=0.5)
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(post, service)
        eventually(lambda: meter(service, "copydesk_waiting_pages") == 1)
        began = time.monotonic()

        assert service.stop() == 1

        assert time.monotonic() - began < 10
        status, body = client.result()
        assert (status, json.loads(body)["title"]) == (503, "Service Unavailable")
    assert [row["lost_requests"] for row in service.logged if row["message"] == "ended"] == [1]


def test_a_page_that_nobody_waits_for_any_more_does_not_put_off_the_end(service_of):
    service = service_of(seconds_a_page=20, timeout=0.2, grace=2)
    assert post(service)[0] == 503
    began = time.monotonic()

    assert service.stop() == 0

    assert time.monotonic() - began < 10


def test_a_stream_is_told_where_to_go_on(service_of):
    service = service_of(seconds_a_page=0.05)
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.putrequest("POST", "/v1/pages/stream")
    connection.putheader("content-type", "application/x-ndjson")
    connection.putheader("transfer-encoding", "chunked")
    connection.endheaders()
    for _ in range(3):
        connection.send(b"%x\r\n%s\r\n" % (len(PAGE) + 1, PAGE + b"\n"))
    response = connection.getresponse()
    rows = [json.loads(response.readline()) for _ in range(3)]  # answered while the request goes on

    service.end()
    last = json.loads(response.readline())

    assert ["error" in row for row in rows] == [False] * 3
    assert last["error"].startswith("after line 3: the service is about to end")
    assert response.read() == b""
    connection.close()
    assert service.stop() == 0


def test_sighup_changes_the_model_and_drops_no_request(service_of, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    service = service_of(model=folder, seconds_a_page=0.1)
    first = service.version()
    rename(folder, "other")
    done = threading.Event()

    def send() -> list[tuple[int, str]]:
        seen = []
        while not done.is_set():
            status, body = post(service)
            seen.append((status, json.loads(body)["model"]["version"]))
        return seen

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(send) for _ in range(2)]
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: service.version() != first)
        second = service.version()
        shutil.rmtree(folder)
        service.process.send_signal(signal.SIGHUP)  # there is no model any more: the old one stays
        eventually(lambda: any("could not be loaded again" in row["message"] for row in service.logged))
        time.sleep(0.2)
        done.set()
        seen = [row for client in clients for row in client.result()]

    assert {status for status, _ in seen} == {200}
    assert {version for _, version in seen} == {first, second}
    assert service.version() == second


def rename(folder: Path, name: str) -> None:
    """Make another model of a folder: one that differs in a threshold."""
    saved = load_saved(folder)
    description = read_description(folder).model_copy(update={"thresholds": [0.5, 0.5, 0.5]})
    save_folder(
        folder,
        tensors=saved.model.state_dict(),
        description=description,
        tokenizer=(folder / "tokenizer.json").read_text(),
        name=name,
        created="2026-01-02",
        run={},
        card="",
    )


def test_a_client_that_goes_away_is_not_waited_for(service_of):
    service = service_of(seconds_a_page=0.06, max_waiting=64)  # seconds enough to see them wait, on a busy machine too
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    connection.request("POST", "/v1/pages", json.dumps([{"text": f"goal {i}"} for i in range(60)]).encode(), JSON)
    eventually(lambda: meter(service, "copydesk_waiting_pages") == 60)

    connection.close()

    eventually(lambda: meter(service, "copydesk_waiting_pages") == 0)
    eventually(lambda: any(row.get("status") == 499 for row in service.logged))  # the log is read in a thread
    assert post(service)[0] == 200


def test_clients_that_send_their_headers_or_bodies_slowly_are_cut_off(service):
    head = b"POST /v1/pages HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\ncontent-length: 100\r\n"
    slow = [socket.create_connection(("127.0.0.1", service.port), timeout=30) for _ in range(50)]
    for number, connection in enumerate(slow):
        connection.sendall(head + (b"\r\nx" if number % 2 else b""))
    began = time.monotonic()

    assert post(service)[0] == 200
    answers = [connection.recv(1_000) for connection in slow]

    assert time.monotonic() - began < 20
    assert all(answer == b"" for answer in answers[::2])
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers[1::2])
    for connection in slow:
        connection.close()


def test_clients_that_drip_a_body_that_was_refused_are_cut_off(service):
    kinds = {"/nowhere": "text/plain", "/v1/pages": "application/xml", "/v1/pages/stream": "application/x-ndjson"}
    head = "POST {} HTTP/1.1\r\nhost: x\r\ncontent-type: {}\r\ncontent-length: 100000\r\n\r\n"
    dripping = {path: socket.create_connection(("127.0.0.1", service.port), timeout=0.1) for path in kinds}
    answers = dict.fromkeys(kinds, b"")
    for path, connection in dripping.items():
        connection.sendall(head.format(path, kinds[path]).encode())
    began = time.monotonic()

    while dripping:
        assert time.monotonic() - began < 20
        for path, connection in list(dripping.items()):
            try:
                connection.sendall(b"x")
                answers[path] += (data := connection.recv(10_000))
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                dripping.pop(path).close()

    assert [answer[9:12] for answer in answers.values()] == [b"404", b"415", b"200"]


def test_who_sends_a_long_body_is_told_why_it_is_refused(service):
    for path, status in (("/nowhere", 404), ("/v1/pages", 415)):
        assert post(service, b"x" * 8_000_000, path, {"content-type": "application/xml"})[0] == status


def test_a_thousand_connections_at_once_are_all_answered(service):
    connections = [socket.create_connection(("127.0.0.1", service.port), timeout=60) for _ in range(1_000)]
    request = b"POST /v1/pages HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    for connection in connections:
        connection.sendall(request + b"content-length: %d\r\n\r\n" % len(PAGE) + PAGE)

    answers = []
    for connection in connections:
        answer = b""
        while data := connection.recv(65_536):
            answer += data
        connection.close()
        answers.append(answer)

    statuses = Counter(answer[9:12] for answer in answers)
    assert set(statuses) <= {b"200", b"429"}
    assert statuses[b"200"] >= 64
    assert all(b"retry-after: " in answer for answer in answers if answer[9:12] == b"429")
    assert get(service, "/readyz")[0] == 200


def test_connections_above_the_limit_get_503(service):
    held = [socket.create_connection(("127.0.0.1", service.port), timeout=30) for _ in range(1_100)]

    eventually(lambda: get(service, "/healthz")[0] == 503)
    problem = json.loads(get(service, "/healthz")[1])
    assert (problem["status"], problem["what"], problem["limit"]) == (503, "connections", 1_050)

    for connection in held:
        connection.close()
    eventually(lambda: get(service, "/healthz")[0] == 200)


def test_what_is_no_http_gets_a_problem_too(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(b"HELLO\r\n\r\n")
        answer = b""
        while data := connection.recv(1_000):
            answer += data

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert b"content-type: application/problem+json" in head
    assert json.loads(body)["status"] == 400
