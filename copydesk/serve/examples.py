"""What the documentation of the service shows: requests and answers, as they really are.

Knows the shape of OpenAPI's bodies and examples; the answers were made by a released model.
"""

import json
from typing import Any

from pydantic import TypeAdapter

from copydesk.serve.bodies import HTML, JSON, LINES, TEXT

PAGE_HTML = (
    "<h1>Night ferry sails again</h1><p>The night ferry to Ostrava Quay sailed on Monday after eleven weeks in dock."
    "</p><aside>Subscribe to The Saltmarsh Echo for $2 a week</aside>"
)
PAGE_TEXT = "Night ferry sails again\n\nThe night ferry sailed on Monday.\n\nSubscribe for $2 a week"
URL = "https://saltmarsh-echo.example/ferry"

_ANSWER: dict[str, Any] = {
    "source": None,
    "url": URL,
    "text": "Night ferry sails again\n\nThe night ferry to Ostrava Quay sailed on Monday after eleven weeks in dock."
    "\n\nSubscribe to The Saltmarsh Echo for $2 a week",
    "headline": "Night ferry sails again",
    "body": "The night ferry to Ostrava Quay sailed on Monday after eleven weeks in dock.",
    "sections": [
        {
            "text": "Night ferry sails again",
            "label": "body",
            "role": "headline",
            "score": 0.905,
            "scores": {"body": 0.905, "boilerplate": 0.0924, "paywall": 0.0006, "sponsored": 0.002},
            "start": 0,
            "end": 23,
            "tag": "body>h1",
        },
        {
            "text": "The night ferry to Ostrava Quay sailed on Monday after eleven weeks in dock.",
            "label": "body",
            "role": None,
            "score": 0.7687,
            "scores": {"body": 0.7687, "boilerplate": 0.2254, "paywall": 0.0014, "sponsored": 0.0044},
            "start": 25,
            "end": 101,
            "tag": "body>p",
        },
        {
            "text": "Subscribe to The Saltmarsh Echo for $2 a week",
            "label": "paywall",
            "role": None,
            "score": 0.8919,
            "scores": {"body": 0.0007, "boilerplate": 0.072, "paywall": 0.8919, "sponsored": 0.0354},
            "start": 103,
            "end": 148,
            "tag": "body>aside",
        },
    ],
    "topics": [],
    "model": {"name": "copydesk", "version": "cb646c9409e1"},
}
_ANY_BYTES: dict[str, Any] = {}
"""A crawler's page may be anything; OpenAPI 3.1 says so by saying nothing."""
_FAILED = {
    "source": None,
    "error": "the page has 10,412 sections, the limit is 10,000: cut it, or raise --max-sections",
}

PAGES_ANSWER: dict[str, Any] = {
    "description": "The page, or a row for each page of a list.",
    "content": {
        JSON: {
            "examples": {
                "one page": {"value": _ANSWER},
                "a list, of which one page could not be read": {"value": [_ANSWER, _FAILED]},
            }
        }
    },
}
STREAM_ANSWER: dict[str, Any] = {
    "description": "A line for each line.",
    "content": {LINES[0]: {"schema": {"type": "string"}, "example": f"{json.dumps(_ANSWER)}\n{json.dumps(_FAILED)}\n"}},
}


def pages_request(page: Any) -> dict[str, Any]:
    """Describe the bodies that `POST /v1/pages` takes.

    Args:
        page: type of one page.
    """
    one = {"html": PAGE_HTML, "url": URL}
    return {
        "required": True,
        "content": {
            JSON: {
                # Of a list whatever is no page has a row that says so.
                "schema": _inline(TypeAdapter(page | list[page | Any]).json_schema()),
                "examples": {
                    "HTML": {"value": one},
                    "plain text": {"value": {"text": PAGE_TEXT}},
                    "many": {"value": [one, {"text": PAGE_TEXT}]},
                },
            },
            HTML: {"schema": _ANY_BYTES, "example": PAGE_HTML},
            TEXT: {"schema": _ANY_BYTES, "example": PAGE_TEXT},
        },
    }


def stream_request() -> dict[str, Any]:
    """Describe the body that `POST /v1/pages/stream` takes."""
    lines = [{"html": PAGE_HTML, "url": URL}, {"text": PAGE_TEXT}]
    example = "".join(f"{json.dumps(line)}\n" for line in lines)
    content = {name: {"schema": _ANY_BYTES, "example": example} for name in LINES}
    return {"required": True, "content": content}


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema with its definitions in the places where they are used."""
    definitions = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return resolve(definitions[part["$ref"].rpartition("/")[2]])
            return {key: resolve(value) for key, value in part.items()}
        return [resolve(item) for item in part] if isinstance(part, list) else part

    return dict(resolve(schema))
