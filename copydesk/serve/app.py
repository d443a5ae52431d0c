"""The HTTP interface: routes, and what their documentation says.

Knows paths, content types and statuses; how a request's pages are read is in `copydesk.serve.desk`.
"""

import asyncio
import hashlib
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

import copydesk
from copydesk.labels import SectionLabel
from copydesk.page import FailedPage, ModelInfo, Page, PageError
from copydesk.predictor import Document
from copydesk.serve import examples
from copydesk.serve.bodies import (
    HTML,
    JSON,
    LINES,
    TEXT,
    GivenPage,
    media_type,
    parse_pages,
    raw_document,
    read_body,
    unsupported,
)
from copydesk.serve.desk import Desk, StoppedError, gone, unless
from copydesk.serve.gate import CLIENT_GONE, Gate
from copydesk.serve.problems import MEDIA_TYPE, Problem, Refused, problem_response, unavailable

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


class ServedTopic(BaseModel):
    """A topic that the model can assign."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    name: str
    parent: str | None
    """Id of the broader topic, which this one implies."""
    threshold: float
    """Probability from which it is assigned."""


class ServedModel(ModelInfo):
    """The model that reads."""

    created: str
    labels: list[str]
    topics: list[ServedTopic]
    limits: dict[str, float]
    """What requests and pages may cost here."""


class Health(BaseModel):
    """The service's state."""

    status: str


def create_app(desk: Desk, *, keys: Sequence[str] = ()) -> ASGIApp:
    """Return the service around a desk.

    Args:
        desk: that answers.
        keys: one of which a request has to show; none: all may come.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        desk.batcher.start()
        yield
        await desk.batcher.close()

    app = FastAPIOffline(
        title="copydesk",
        version=getattr(copydesk, "__version__", None) or "checkout",
        summary="What is body, boilerplate, paywall or sponsored on a news page, and what the article is about.",
        redoc_url=None,
        lifespan=lifespan,
    )
    _answer_faults(app)
    _add_pages(app, desk)
    _add_state(app, desk)
    _add_playground(app)
    # Around everything, also around the handler of our own faults.
    return Gate(app, meters=desk.meters, closing=desk.closing, keys=keys)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def _answer_faults(app: FastAPI) -> None:
    async def refuse(request: Request, refused: Exception) -> Response:
        return problem_response(_as_refusal(refused), request_id=request.state.notes["request_id"])

    async def fail(request: Request, _: Exception) -> Response:
        refused = Refused(500, "the service failed on this request: report it with its request_id")
        return problem_response(refused, request_id=request.state.notes["request_id"])

    async def leave(*_: Any) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(Refused, refuse)
    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(Exception, fail)
    app.add_exception_handler(ClientDisconnect, leave)
    app.add_exception_handler(StoppedError, leave)


def _as_refusal(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    status, headers = getattr(error, "status_code", 500), getattr(error, "headers", None)
    detail = f"{HTTPStatus(status).phrase.lower()}: /docs lists what there is"
    return Refused(status, detail, what="path or method", headers=dict(headers or {}))


def _add_pages(app: FastAPI, desk: Desk) -> None:
    refusals = _problems(400, 401, 408, 413, 415, 422, 429, 500, 503)

    @app.post(
        "/v1/pages",
        responses={200: examples.PAGES_ANSWER, **refusals},
        response_model=Page | list[Page | FailedPage],
        openapi_extra={"requestBody": examples.pages_request(GivenPage)},
        tags=["pages"],
    )
    async def read_pages(
        request: Request,
        url: Annotated[
            str | None, Query(description="Address of a page that is sent as it is; handed back in the answer.")
        ] = None,
    ) -> Response:
        """Read one page or many.

        One page gives one answer, a list of pages a list: a page of it that cannot be read has a row with `error`
        in its place. The body may be gzip (`Content-Encoding: gzip`).
        """
        taken: list[int] = []
        try:
            documents, many = await _documents_of(request, desk, url=url, taken=taken)
            request.state.notes["pages"] = len(documents)
            answers = await unless(gone(request), desk.read(documents))
        finally:
            desk.held.add(-sum(taken))
        body = _list_of(answers) if many else _page_or_refusal(answers[0]).model_dump_json()
        return Response(body, media_type=JSON)

    @app.post(
        "/v1/pages/stream",
        responses={200: examples.STREAM_ANSWER, **_problems(401, 413, 415, 500, 503)},
        response_class=Response,
        openapi_extra={"requestBody": examples.stream_request()},
        tags=["pages"],
    )
    async def stream_pages(request: Request) -> Response:
        """Read pages as JSON lines, and write a line for each, in order, while more come.

        A line that cannot be read has a line with `error` in its place. Read while you send: a client that does not
        is not read either.
        """
        kind, _ = media_type(request)
        if kind not in LINES:
            raise unsupported("content-type", kind, " or ".join(LINES))
        if desk.closing.is_set():
            raise unavailable("the service is about to end: send it to another", retry_after=1)
        return LinesResponse(request, desk)


async def _documents_of(
    request: Request, desk: Desk, *, url: str | None, taken: list[int]
) -> tuple[list[Document | FailedPage], bool]:
    kind, charset = media_type(request)
    if kind not in {JSON, HTML, TEXT}:
        raise unsupported("content-type", kind, f"{JSON}, {HTML} or {TEXT}")
    body = await read_body(request, desk.settings, desk.held, taken)
    request.state.notes["bytes_in"] = len(body)
    if kind == JSON:
        return parse_pages(body)
    return [raw_document(body, kind="html" if kind == HTML else "text", charset=charset, url=url)], False


def _page_or_refusal(answer: Page | FailedPage | BaseException) -> Page:
    if isinstance(answer, Page):
        return answer
    unreadable = isinstance(answer, PageError | FailedPage)
    status = HTTPStatus.UNPROCESSABLE_ENTITY if unreadable else HTTPStatus.INTERNAL_SERVER_ERROR
    raise Refused(status, answer.error if isinstance(answer, FailedPage) else str(answer), what="page")


def _list_of(answers: Sequence[Page | FailedPage | BaseException]) -> str:
    rows = (
        FailedPage(source=None, error=str(answer)) if isinstance(answer, BaseException) else answer
        for answer in answers
    )
    return f"[{','.join(row.model_dump_json() for row in rows)}]"


class LinesResponse(Response):
    """Writes a line for each row of a stream, as they come."""

    def __init__(self, request: Request, desk: Desk) -> None:
        super().__init__(media_type=LINES[0])
        self.request, self.desk = request, desk
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI)
        """Send the rows; end quietly when the client leaves."""
        notes = self.request.state.notes
        notes["pages"] = 0
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for row in self.desk.stream(self.request):
                notes["pages"] += 1
                line = f"{row.model_dump_json()}\n".encode()
                async with asyncio.timeout(self.desk.settings.timeout):  # a client that does not read
                    await send({"type": "http.response.body", "body": line, "more_body": True})
        except (ClientDisconnect, TimeoutError) as error:
            notes["left"] = type(error).__name__
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _add_state(app: FastAPI, desk: Desk) -> None:
    @app.get("/v1/model", responses=_problems(401), tags=["model"])
    async def describe_model() -> ServedModel:
        """Say which model reads, what it can say, and what it may cost."""
        saved, settings = desk.predictor.saved, desk.settings
        return ServedModel(
            **desk.predictor.info.model_dump(),
            created=saved.manifest.created,
            labels=list(SectionLabel),
            topics=[
                ServedTopic(id=topic.id, name=topic.name, parent=topic.parent, threshold=threshold)
                for topic, threshold in zip(saved.topics.topics, saved.thresholds.tolist(), strict=True)
            ],
            limits={
                name: getattr(settings, name)
                for name in ("max_body", "max_page", "max_sections", "max_depth", "max_pages", "max_waiting", "timeout")
            },
        )

    @app.get("/healthz", tags=["state"])
    async def healthz() -> Health:
        """Say that the process answers."""
        return Health(status="alive")

    @app.get("/readyz", responses=_problems(503), tags=["state"])
    async def readyz() -> Health:
        """Say whether to send requests here."""
        if desk.closing.is_set():
            raise unavailable("the service is about to end: send requests to another", retry_after=1)
        return Health(status="ready")

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_problems(401)},
        tags=["state"],
    )
    async def metrics() -> Response:
        """Return counters for Prometheus."""
        return Response(desk.meters.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})

    schema = app.openapi

    def with_problem() -> dict[str, Any]:
        content = schema()
        shape = Problem.model_json_schema()
        content["components"]["schemas"].setdefault("Problem", shape)
        return content

    app.openapi = with_problem  # type: ignore[method-assign]


def _add_playground(app: FastAPI) -> None:
    page = files("copydesk.serve").joinpath("playground.html").read_text("utf-8")
    hashes = [
        f"'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in _SCRIPT.findall(page)
    ]
    policy = (
        "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        f"form-action 'none'; frame-ancestors 'none'; script-src {' '.join(hashes)}"
    )

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy, "referrer-policy": "no-referrer"})
