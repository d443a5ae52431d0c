"""What the service says when it cannot answer: problem details (RFC 9457).

Knows statuses and their wording; knows nothing of pages or models.
"""

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"


class Problem(BaseModel):
    """Why a request was not answered: what is wrong, what was found, what was allowed."""

    model_config = ConfigDict(
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "title": "Content Too Large",
                    "status": 413,
                    "detail": "the request has more than 20,971,520 bytes: send fewer pages at a time",
                    "what": "body bytes",
                    "got": 31_457_280,
                    "limit": 20_971_520,
                    "request_id": "5f0c2d1e9b3a4c7d8e6f",
                }
            ]
        },
    )

    title: str
    """The status in words."""
    status: int = Field(ge=400, le=599)
    detail: str
    """What is wrong with this request, and what to do."""
    what: str | None = None
    """The thing that is wrong or limited."""
    got: int | float | str | None = None
    """What the request has of it."""
    limit: int | float | str | None = None
    """What it may have, or should be."""
    request_id: str | None = None
    """Names this request in the logs."""


class Refused(Exception):  # noqa: N818 (an answer, not a fault of ours)
    """A request is not answered, with the reason for its sender."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        what: str | None = None,
        got: float | str | None = None,
        limit: float | str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.what, self.got, self.limit = what, got, limit
        self.headers = headers or {}


def busy(detail: str, *, what: str, got: float, limit: float, retry_after: int) -> Refused:
    """Return the refusal of a request that may come again a little later."""
    headers = {"retry-after": str(retry_after)}
    return Refused(HTTPStatus.TOO_MANY_REQUESTS, detail, what=what, got=got, limit=limit, headers=headers)


def unavailable(detail: str, *, retry_after: int, **members: Any) -> Refused:
    """Return the refusal of a request that the service cannot answer now."""
    return Refused(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers={"retry-after": str(retry_after)}, **members)


def problem_response(refused: Refused, *, request_id: str | None) -> Response:
    """Return the answer that says so."""
    problem = Problem(
        title=HTTPStatus(refused.status).phrase,
        status=refused.status,
        detail=refused.detail,
        what=refused.what,
        got=refused.got,
        limit=refused.limit,
        request_id=request_id,
    )
    body = problem.model_dump_json(exclude_none=True)
    return Response(body, refused.status, media_type=MEDIA_TYPE, headers=refused.headers)
