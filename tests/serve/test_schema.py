"""Schemathesis: requests that the documentation allows, and others, find nothing."""

import os
import subprocess
import sys
from pathlib import Path

HOOKS = """
import json
import schemathesis

@schemathesis.serializer("application/x-ndjson", "application/jsonl", "application/jsonlines")
def lines(ctx, value):
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()
"""


def test_what_the_documentation_says_is_true(service_of, tmp_path: Path):
    service = service_of(read_timeout=5)
    (tmp_path / "hooks.py").write_text(HOOKS)
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json"]
    options = ["--max-examples", "40", "--seed", "1", "--generation-database", "none", "--no-color"]

    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    requests = [row for row in service.logged if row["message"] == "request"]
    assert len(requests) > 100
    assert {row["path"] for row in requests} >= {"/v1/pages", "/v1/pages/stream", "/v1/model", "/healthz", "/metrics"}
    assert {row["status"] for row in requests} >= {200, 405, 415, 422}
    assert 500 not in {row["status"] for row in requests}
