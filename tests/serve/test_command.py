import logging
import socket
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from copydesk.cli import app
from copydesk.serve.command import read_keys
from copydesk.serve.settings import Settings


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The service sets up logging for its whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def run(*arguments: str):
    return CliRunner().invoke(app, ["serve", *arguments], prog_name="copydesk", env={"COLUMNS": "200"})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Note what would be served instead of serving it."""
    noted = {}

    def note(source, settings, **options) -> int:
        noted.update(source=source, settings=settings, **options)
        return 0

    monkeypatch.setattr("copydesk.serve.server.serve", note)
    return noted


def test_help_names_every_bound_with_its_default():
    text = run("--help").output

    for option in ("--model", "--host", "--port", "--api-key-file", "--max-body", "--grace", "--watch", "127.0.0.1"):
        assert option in text


def test_defaults_are_those_of_the_settings_and_listen_on_loopback(served, tiny_model):
    result = run("--model", str(tiny_model))

    assert (result.exit_code, result.stderr) == (0, "")
    assert served["settings"] == Settings()
    assert (served["host"], served["port"], served["keys"]) == ("127.0.0.1", 8_080, [])
    assert served["source"].address == str(tiny_model)
    assert served["source"].limits.max_bytes == Settings().max_page


def test_options_reach_the_settings(served, tmp_path):
    (tmp_path / "keys").write_text("# for crawlers\none\n\n two \n")

    run(
        "--model",
        "models:/copydesk@champion",
        "--max-pages",
        "3",
        "--timeout",
        "2.5",
        "--api-key-file",
        str(tmp_path / "keys"),
    )

    assert served["source"].address == "models:/copydesk@champion"
    assert (served["settings"].max_pages, served["settings"].timeout) == (3, 2.5)
    assert served["keys"] == ["one", "two"]


def test_an_open_service_without_a_key_is_warned_of(served, tiny_model):
    assert "--api-key-file" in run("--model", str(tiny_model), "--host", "0.0.0.0").stderr  # noqa: S104 (never bound)


@pytest.mark.parametrize("content", ["", "# none\n", "schlüssel\n"])
def test_a_key_file_without_a_usable_key_is_refused(tmp_path, content):
    (tmp_path / "keys").write_text(content)

    with pytest.raises(ValueError, match="at least one"):
        read_keys(tmp_path / "keys")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-pages", "999"], "raise max_waiting to at least 999"),
        (["--api-key-file", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "there is no model folder nowhere"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_listens(tiny_model, arguments, words):
    model = [] if "--model" in arguments else ["--model", str(tiny_model)]

    result = run("--port", "0", *model, *arguments)

    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_an_address_that_is_taken_is_said_at_once(tiny_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("--model", str(tiny_model), "--port", str(port))

    assert result.exit_code == 2
    assert f"cannot listen on port {port} of 127.0.0.1 (Address already in use): give a free port" in result.stderr


def test_a_host_that_is_none_is_said_at_once(tiny_model, monkeypatch):
    def refuse(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)  # no name leaves this machine

    result = run("--model", str(tiny_model), "--host", "nowhere.invalid")

    assert result.exit_code == 2
    assert "cannot listen on port 8080 of nowhere.invalid (Name or service not known)" in result.stderr
    assert "an address of this machine with --host" in result.stderr
