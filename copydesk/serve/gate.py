"""What every request passes through: its id, the key, the access log, the counters.

Knows headers and statuses; knows nothing of what a request is about. Nothing of a page is ever logged.
"""

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from copydesk.serve.metering import Meters
from copydesk.serve.problems import Refused, problem_response, unavailable

access = logging.getLogger("copydesk.access")
log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"})
"""Work without a key: they tell nothing of pages."""
DOCS_ASSETS = "/static-offline-docs"
CLIENT_GONE = 499
"""In the access log, where nobody is left to read a status."""

_REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class Gate:
    """ASGI middleware around the whole service."""

    def __init__(self, app: ASGIApp, *, meters: Meters, closing: asyncio.Event, keys: Sequence[str] = ()) -> None:
        """Wrap an application.

        Args:
            app: to be wrapped.
            meters: that count.
            closing: set when clients should take no connection for granted any more.
            keys: one of which a request has to show; none: all may come.
        """
        self.app, self.meters, self.closing = app, meters, closing
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or pass on what is none."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        notes: dict[str, Any] = {"request_id": _request_id(headers)}
        scope.setdefault("state", {})["notes"] = notes
        started = time.monotonic()
        status = sent = 0

        async def send_noting(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(raw=message.setdefault("headers", []))
                out["x-request-id"] = notes["request_id"]
                out["x-content-type-options"] = "nosniff"
                if self.closing.is_set():
                    out["connection"] = "close"
                if status == CLIENT_GONE:
                    return
            elif status == CLIENT_GONE:
                return
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            admitted = self._admits(scope["path"], headers)
            answer = self.app if admitted else problem_response(_NO_KEY, request_id=notes["request_id"])
            await answer(scope, receive, send_noting)
        except asyncio.CancelledError:  # the grace time is over
            if not status:
                await problem_response(_ENDED, request_id=notes["request_id"])(scope, receive, send_noting)
            raise
        except BaseException:
            status = status or 500
            raise
        finally:
            self._note(scope, notes, status=status, sent=sent, seconds=time.monotonic() - started)

    def _admits(self, path: str, headers: Headers) -> bool:
        if not self.keys or path in OPEN_PATHS or path.startswith(DOCS_ASSETS):
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        shown = (token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")).encode()
        matches = [hmac.compare_digest(shown, key) for key in self.keys]  # all, so that time tells nothing
        return any(matches)

    def _note(self, scope: Scope, notes: dict[str, Any], *, status: int, sent: int, seconds: float) -> None:
        # The route's pattern, not the path: whoever asks for random paths must not make a counter each.
        route = getattr(scope.get("route"), "path", "none")
        self.meters.requests.labels(scope["method"] if route != "none" else "any", route, status).inc()
        self.meters.seconds.labels(route).observe(seconds)
        client = scope.get("client")
        facts = {
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "milliseconds": round(seconds * 1_000, 1),
            "bytes_out": sent,
            **notes,
        }
        access.info("request", extra={"facts": facts})


_NO_KEY = Refused(
    401,
    "the request shows no valid key: send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`",
    what="api key",
    headers={"www-authenticate": "Bearer"},
)


_ENDED = unavailable("the service ended before it could answer: send the request again", retry_after=1)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:20]


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)
