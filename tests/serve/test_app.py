"""The HTTP interface, in memory: what goes in, what comes out, what is refused."""

import gzip
import json
import re
from pathlib import Path

import jsonschema_rs
import pytest
from starlette.testclient import TestClient

from copydesk.page import FailedPage, Page
from copydesk.predictor import Document, Predictor
from copydesk.serve import examples
from copydesk.serve.problems import Problem

HTML = "<h1>Minister said talks</h1><p>The goal of the match today.</p><p>Subscribe to read more.</p>"
TEXT = "Minister said talks\n\nThe match today."
ROOT = Path(__file__).parents[2]


def expected(predictor: Predictor, *documents: Document) -> list[dict]:
    return [page.model_dump(mode="json") for page in predictor.predict(documents)]


def refusal(response) -> Problem:
    assert response.headers["content-type"] == "application/problem+json", response.text
    problem = Problem.model_validate_json(response.content)
    assert problem.status == response.status_code
    assert problem.request_id == response.headers["x-request-id"]
    return problem


def post_raw(client: TestClient, body: bytes, kind: str, **headers: str):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post("/v1/pages", content=body, headers={"content-type": kind, **names})


def test_a_page_as_json(client_of, predictor):
    response = client_of().post("/v1/pages", json={"html": HTML, "url": "https://news.example/a"})

    assert response.json() == expected(predictor, Document(HTML, url="https://news.example/a", kind="html"))[0]


def test_many_pages_as_json_come_back_in_order(client_of, predictor):
    response = client_of().post("/v1/pages", json=[{"text": TEXT}, {"html": HTML}, {"text": ""}])

    documents = [Document(TEXT, kind="text"), Document(HTML, kind="html"), Document("", kind="text")]
    assert response.json() == expected(predictor, *documents)


@pytest.mark.parametrize(("kind", "body"), [("html", HTML), ("text", TEXT), ("text", HTML)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_page_as_it_comes_from_a_crawler(client_of, predictor, kind, body, pack):
    media_type = {"html": "text/html", "text": "text/plain"}[kind]
    packed = {"content_encoding": "gzip"} if pack is gzip.compress else {}

    response = post_raw(client_of(), pack(body.encode()), media_type, **packed)

    assert response.json() == expected(predictor, Document(body, kind=kind))[0]


def test_the_address_of_a_raw_page_is_handed_back(client_of):
    response = client_of().post(
        "/v1/pages?url=https%3A%2F%2Fa.example", content=TEXT, headers={"content-type": "text/plain"}
    )

    assert response.json()["url"] == "https://a.example"


@pytest.mark.parametrize(
    ("body", "charset"),
    [
        ("Größe".encode(), ""),
        ("Größe".encode(), "; charset=utf-8"),
        ("Größe".encode(), "; charset=iso-8859-1"),  # UTF-8 is UTF-8, whatever a server claims
        ("Größe".encode("latin-1"), "; charset=ISO-8859-1"),
        ("Größe".encode("latin-1"), '; boundary=x; Charset="latin1"'),
        ("Größe".encode("utf-16"), "; charset=utf-8"),
        ("Größe".encode("utf-32"), "; charset=utf-8"),
        ("Größe".encode("utf-16-le"), "; charset=utf-16le"),
        ("Größe".encode("utf-16-le"), "; charset=utf-16"),
        ("Größe".encode("utf-16-be"), "; charset=utf-16be"),
    ],
)
def test_encodings(client_of, body, charset):
    assert post_raw(client_of(), body, f"text/plain{charset}").json()["text"] == "Größe"


def test_a_charset_decides_between_encodings(client_of):
    assert post_raw(client_of(), "Łódź".encode("iso-8859-2"), "text/plain; charset=iso-8859-2").json()["text"] == "Łódź"


@pytest.mark.parametrize(
    ("text", "charset"), [("goal", "utf-16le"), ("goal", "utf-16"), ("goal", "utf-16be"), ("試合", "iso-2022-jp")]
)
def test_a_charset_is_believed_where_its_bytes_are_utf_8_too(client_of, text, charset):
    body = text.encode("utf-16-le" if charset == "utf-16" else charset)
    body.decode("utf-8")

    assert post_raw(client_of(), body, f"text/plain; charset={charset}").json()["text"] == text


def test_one_bad_byte_spoils_nothing_else_of_declared_utf_8(client_of):
    body = "Größe – Łódź ".encode() + b"\xff" + " naïve".encode()

    text = post_raw(client_of(), body, "text/plain; charset=utf-8").json()["text"]

    assert text == "Größe – Łódź \ufffd naïve"


def test_two_gzip_members_are_one_body(client_of):
    body = gzip.compress(b"goal") + gzip.compress(b" today")

    assert post_raw(client_of(), body, "text/plain", content_encoding="gzip").json()["text"] == "goal today"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "no JSON"),
        (b"{", 400, "no JSON"),
        (b'{"text": "\xff"}', 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"null", 422, "either html or text"),
        (b"3", 422, "either html or text"),
        (b"{}", 422, "either html or text"),
        (b'{"html": "a", "text": "b"}', 422, "either html or text"),
        (b'{"html": 3}', 422, "html: Input should be a valid string"),
        (b'{"html": null}', 422, "valid string"),
        (b'{"html": "a", "url": 3}', 422, "url: Input should be a valid string"),
        (b'{"html": "a", "kind": "html"}', 422, "kind"),
        (b'{"html": "a", "\\ud800": "html"}', 422, "\ufffd: Extra inputs"),
        (b'{"html": ' + b'{"a":' * 900 + b"1" + b"}" * 901, 422, "html: Input should be a valid string"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_malformed_json_is_refused_with_its_place(client_of, body, status, words):
    response = post_raw(client_of(), body, "application/json")

    assert response.status_code == status
    assert refusal(response).detail.count(words) == 1


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"html": None}, 'html: Input should be a valid string. Expected {"html": "<p>…</p>", "url": "https://…"}'),
        ({"text": "a", "url": 3}, "url: Input should be a valid string"),
        ({"text": "a", "html": "a"}, "page: a page is an object with either html or text"),
        ([], "page: a page is an object"),
        (None, "page: a page is an object"),
    ],
    ids=repr,
)
def test_an_item_that_is_no_page_takes_no_other_with_it(client_of, predictor, item, words):
    client = client_of()

    rows = client.post("/v1/pages", json=[{"text": TEXT}, item, {"html": HTML}]).json()

    assert [rows[0], rows[2]] == expected(predictor, Document(TEXT, kind="text"), Document(HTML, kind="html"))
    assert FailedPage.model_validate(rows[1]).error.startswith(words)
    assert "a list of such" not in rows[1]["error"]
    assert 'copydesk_pages_total{outcome="refused"} 1.0' in client.get("/metrics").text


def test_a_lone_surrogate_becomes_a_replacement_character_as_in_python(client_of, predictor):
    body = rb'[{"html": "<p>ok"}, {"html": "<p>bad \ud800 x", "url": "\ud83d\ude00 \udc00"}]'

    rows = post_raw(client_of(), body, "application/json").json()

    assert rows[1]["url"] == "\U0001f600 \ufffd"
    assert [row["text"] for row in rows] == [
        page.text for page in predictor.predict(["<p>ok", "<p>bad \ud800 x"], kind="html")
    ]


def test_a_list_of_which_no_page_can_be_read_has_its_rows(client_of):
    assert ["error" in row for row in client_of().post("/v1/pages", json=[3, {}]).json()] == [True, True]


@pytest.mark.parametrize(
    ("headers", "what"),
    [
        ({"content-type": "application/xml"}, "content-type"),
        ({}, "content-type"),
        ({"content-type": "text/plain; charset=klingon"}, "charset"),
        ({"content-type": "text/plain", "content-encoding": "br"}, "content-encoding"),
    ],
)
def test_what_nobody_reads_here_is_named(client_of, headers, what):
    problem = refusal(client_of().post("/v1/pages", content=b"x", headers=headers))

    assert (problem.status, problem.what) == (415, what)
    assert problem.limit


@pytest.mark.parametrize(
    "body", [b"no gzip", gzip.compress(b"page" * 99)[:-9], b""], ids=["plain", "cut short", "empty"]
)
def test_broken_gzip_is_refused(client_of, body):
    problem = refusal(post_raw(client_of(), body, "text/plain", content_encoding="gzip"))

    assert (problem.status, problem.what) == (400, "content-encoding")


@pytest.mark.parametrize("announce", [True, False])
def test_a_body_over_the_limit_is_refused(client_of, announce):
    body = b"x" * 1_001 if announce else iter([b"x" * 600, b"x" * 401])

    problem = refusal(post_raw(client_of(max_body=1_000), body, "text/plain"))

    assert (problem.status, problem.what, problem.got, problem.limit) == (413, "body bytes", 1_001, 1_000)


def test_a_gzip_bomb_is_not_unpacked(client_of):
    bomb = gzip.compress(bytes(200 * 2**20))

    client = client_of()
    problem = refusal(post_raw(client, bomb, "text/html", content_encoding="gzip"))

    assert problem.status == 413
    assert problem.got < problem.limit + 2**17
    assert client.desk.held.size == 0


def test_bodies_of_all_requests_together_are_bounded(client_of):
    response = post_raw(client_of(max_held=1_000), b"x" * 1_001, "text/plain")

    problem = refusal(response)
    assert (problem.status, problem.what, response.headers["retry-after"]) == (503, "bytes held", "1")


@pytest.mark.parametrize(
    ("body", "option"),
    [("x" * 100_001, "--max-page"), ("a\n" * 501, "--max-sections"), ("<div>" * 11_000, "--max-depth")],
    ids=["page", "sections", "depth"],
)
def test_a_page_over_a_limit_is_refused_alone(client_of, body, option):
    client = client_of()
    body = {"html" if "<" in body else "text": body}

    problem = refusal(client.post("/v1/pages", json=body))
    assert problem.status == 422
    assert problem.detail.endswith(f"raise {option}")
    rows = client.post("/v1/pages", json=[{"text": "goal"}, body]).json()
    assert Page.model_validate(rows[0]).text == "goal"
    assert FailedPage.model_validate(rows[1]).error == problem.detail


def test_too_many_pages_are_refused(client_of):
    problem = refusal(client_of(max_pages=2).post("/v1/pages", json=[{"text": "a"}] * 3))

    assert (problem.status, problem.what, problem.got, problem.limit) == (422, "pages", 3, 2)


def test_a_full_queue_says_when_to_come_again(client_of):
    client = client_of(max_waiting=40, max_pages=40)
    client.desk.batcher.num_waiting = 40

    response = client.post("/v1/pages", json={"text": "a"})

    problem = refusal(response)
    assert (problem.status, problem.what, problem.got, problem.limit) == (429, "waiting pages", 41, 40)
    assert int(response.headers["retry-after"]) >= 1


def test_a_page_that_breaks_the_model_is_a_500_for_itself_alone(client_of, predictor, monkeypatch):
    real = predictor.section_logits

    def fail_on_talks(encoded):
        if any(len(page) == 2 for page in encoded):
            raise RuntimeError("boom")
        return real(encoded)

    monkeypatch.setattr(predictor, "section_logits", fail_on_talks)
    client = client_of()

    problem = refusal(client.post("/v1/pages", json={"text": TEXT}))
    rows = client.post("/v1/pages", json=[{"text": "goal"}, {"text": TEXT}, {"text": "news"}]).json()

    assert problem.status == 500
    assert "boom" in problem.detail
    assert ["error" in row for row in rows] == [False, True, False]


def test_a_late_answer_is_none_and_its_page_leaves_the_queue(client_of, predictor, monkeypatch):
    import threading

    go = threading.Event()
    real = predictor.read_batch
    monkeypatch.setattr(predictor, "read_batch", lambda batch: (go.wait(60), real(batch))[1])
    client = client_of(timeout=0.2)

    response = client.post("/v1/pages", json={"text": "a"})
    go.set()

    assert refusal(response).status == 503
    assert int(response.headers["retry-after"]) >= 1
    assert client.desk.batcher.num_waiting == 0


def test_a_stream_has_a_row_for_each_line_in_order(client_of, predictor):
    lines = [json.dumps({"text": f"goal {i}"}).encode() for i in range(100)]
    lines[3], lines[5], lines[60] = b'{"text": 3}', b'{"text": "' + b"x" * 100_001 + b'"}', b"goal 60"
    body = b"\n".join([*lines[:50], b"", b"  ", *lines[50:]])

    response = client_of(stream_window=4).post(
        "/v1/pages/stream", content=body, headers={"content-type": "application/x-ndjson"}
    )

    rows = [json.loads(line) for line in response.text.splitlines()]
    assert response.headers["content-type"] == "application/x-ndjson"
    assert [row.get("text") for row in rows] == [None if i in {3, 5, 60} else f"goal {i}" for i in range(100)]
    assert rows[3]["error"].startswith("line 4: text: Input should be a valid string")
    assert "a list of such" not in rows[3]["error"]
    assert rows[5]["error"].startswith("line 6: the page has 100,001 bytes, the limit is 100,000")
    assert rows[60]["error"].startswith("line 63: the line is no JSON")


def test_a_stream_may_be_gzip_and_waits_for_room(client_of):
    body = gzip.compress(b'{"text": "goal"}\n' * 50)
    headers = {"content-type": "application/jsonl", "content-encoding": "gzip"}

    response = client_of(max_waiting=3, max_pages=3, stream_window=3).post(
        "/v1/pages/stream", content=body, headers=headers
    )

    assert len(response.text.splitlines()) == 50


def test_a_stream_ends_at_a_line_over_the_limit(client_of):
    body = b'{"text": "goal"}\n{"text": "' + b"x" * 1_000

    response = client_of(max_body=500).post(
        "/v1/pages/stream", content=body, headers={"content-type": "application/x-ndjson"}
    )

    rows = [json.loads(line) for line in response.text.splitlines()]
    assert [sorted(row)[:2] for row in rows] == [["body", "headline"], ["error", "source"]]
    assert "after line 1: the request has more than 500 bytes" in rows[1]["error"]


def test_a_stream_of_another_type_is_refused(client_of):
    response = client_of().post("/v1/pages/stream", content=b"{}", headers={"content-type": "application/json"})

    assert refusal(response).status == 415


def test_the_service_says_when_it_is_about_to_end(client_of):
    client = client_of()
    assert (client.get("/healthz").json(), client.get("/readyz").json()) == ({"status": "alive"}, {"status": "ready"})

    client.desk.closing.set()

    assert refusal(client.get("/readyz")).status == 503
    assert client.get("/healthz").headers["connection"] == "close"
    assert client.post("/v1/pages", json={"text": "a"}).status_code == 200  # over a connection that was accepted


def test_the_model_is_described(client_of, predictor):
    model = client_of(max_pages=7).get("/v1/model").json()

    assert (model["name"], model["version"]) == ("tiny", predictor.info.version)
    assert [topic["threshold"] for topic in model["topics"]] == [0.9, 0.1, 0.9]
    assert model["limits"]["max_pages"] == 7


def test_metrics_count_requests_pages_sections_and_batches(client_of):
    client = client_of()
    client.post("/v1/pages", json=[{"text": "a\nb"}, {"text": "x" * 100_001}])
    client.get("/v1/no/such/path")

    text = client.get("/metrics").text

    for line in (
        'copydesk_requests_total{method="POST",route="/v1/pages",status="200"} 1.0',
        'copydesk_requests_total{method="any",route="none",status="404"} 1.0',
        'copydesk_pages_total{outcome="read"} 1.0',
        'copydesk_pages_total{outcome="refused"} 1.0',
        "copydesk_waiting_pages 0.0",
        "copydesk_batch_pages_count 1.0",
        'copydesk_model_info{name="tiny"',
    ):
        assert line in text
    sections = re.findall(r'copydesk_sections_total\{label="\w+"\} (\d)', text)
    assert sum(map(int, sections)) == 2


@pytest.mark.parametrize(
    "header", [{"authorization": "Bearer two"}, {"authorization": "bearer  one"}, {"x-api-key": "two"}]
)
def test_a_key_opens(client_of, header):
    client = client_of(keys=("one", "two"))

    assert client.post("/v1/pages", json={"text": "a"}, headers=header).status_code == 200


@pytest.mark.parametrize(
    "header", [{}, {"authorization": "Bearer on"}, {"authorization": "Basic one"}, {"x-api-key": "one " * 9}]
)
def test_without_a_key_only_what_tells_nothing_is_open(client_of, header):
    client = client_of(keys=("one",))

    for path in ("/v1/model", "/metrics", "/v1/pages"):
        response = client.get(path, headers=header)
        assert refusal(response).status == 401
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json"):
        assert client.get(path, headers=header).status_code == 200


def test_a_request_keeps_its_id_if_that_is_harmless(client_of):
    client = client_of()

    assert client.get("/healthz", headers={"x-request-id": "crawl-7.1"}).headers["x-request-id"] == "crawl-7.1"
    assert client.get("/healthz", headers={"x-request-id": 'a"b c'}).headers["x-request-id"] != 'a"b c'


def test_the_access_log_has_facts_and_nothing_of_the_page(client_of, caplog):
    with caplog.at_level("INFO", "copydesk.access"):
        client_of().post("/v1/pages?url=secret", json={"text": "goal"}, headers={"x-request-id": "r1"})

    (facts,) = [record.facts for record in caplog.records if record.name == "copydesk.access"]
    assert facts.pop("milliseconds") > 0
    assert facts.pop("bytes_out") > 100
    assert facts == {
        "client": "testclient",
        "method": "POST",
        "path": "/v1/pages",
        "status": 200,
        "request_id": "r1",
        "bytes_in": 15,
        "pages": 1,
    }


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/pages", 405)])
def test_what_is_not_there_is_a_problem_too(client_of, method, path, status):
    assert refusal(client_of().request(method, path)).status == status


def test_a_fault_of_ours_is_a_problem_that_can_be_reported(client_of):
    client = client_of()
    client.desk.batcher.accept = None

    assert "request_id" in refusal(client.post("/v1/pages", json={"text": "a"})).detail


def test_documentation_loads_nothing_from_elsewhere(client_of):
    client = client_of()
    page = client.get("/docs").text

    links = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert len(links) >= 2
    assert [client.get(link).status_code for link in links] == [200] * len(links)


def documented(client: TestClient, name: str) -> jsonschema_rs.Validator:
    components = client.get("/openapi.json").json()["components"]
    return jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}", "components": components})


def test_the_example_of_the_readme_fits_the_documented_schema_and_answers_have_its_fields(client_of):
    client = client_of()
    readme = (ROOT / "README.md").read_text("utf-8")
    example = json.loads(re.search(r"```json\n(.*?)```", readme, re.DOTALL)[1])
    answer = client.post("/v1/pages", json={"html": HTML}).json()

    validator = documented(client, "Page")
    validator.validate(example)
    validator.validate(answer)
    assert not validator.is_valid(example | {"summary": "x"})
    assert list(answer) == list(example)
    for part in ("sections", "topics"):
        assert list(answer[part][0]) == list(example[part][0])
    assert list(answer["model"]) == list(example["model"])


def test_the_examples_of_the_documentation_are_true(client_of):
    client = client_of()
    operation = client.get("/openapi.json").json()["paths"]["/v1/pages"]["post"]
    answers = operation["responses"]["200"]["content"]["application/json"]["examples"]
    requests = operation["requestBody"]["content"]

    documented(client, "Page").validate(answers["one page"]["value"])
    page = Page.model_validate(answers["one page"]["value"])
    for name, example in requests["application/json"]["examples"].items():
        assert client.post("/v1/pages", json=example["value"]).status_code == 200, name
    answer = client.post("/v1/pages", json=requests["application/json"]["examples"]["HTML"]["value"]).json()
    assert (answer["text"], answer["url"]) == (page.text, examples.URL)
    assert [(row["start"], row["end"], row["tag"]) for row in answer["sections"]] == [
        (section.start, section.end, section.tag) for section in page.sections
    ]
