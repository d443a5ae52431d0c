import gzip
import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import copydesk
from copydesk.cli import app, main
from copydesk.inputs import InputError, find_pages, predict_pages, read_bytes
from copydesk.page import FailedPage, Page

CHECKOUT = Path(copydesk.__file__).parents[1]
HTML = "<h1>Minister said talks</h1><p>The goal of the match today.</p><p>Subscribe to read more.</p>"


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    """Move to a folder of pages, with the tiny model in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COPYDESK_MODEL", str(tiny_model))
    for variable in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "pages"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.html").write_text(HTML)
    (folder / "a.txt").write_text("Minister said talks\n\nThe match today.")
    (folder / "deep" / "c.htm.gz").write_bytes(gzip.compress(HTML.encode()))
    (folder / "style.css").write_text("p {}")
    return folder


def run(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="copydesk")


def rows(result: Result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def start(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "copydesk.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_folder_gives_its_pages_sorted_and_nothing_else(pages):
    result = run("predict", "pages", "--format", "jsonl")

    assert result.exit_code == 0, result.stderr
    assert [row["source"] for row in rows(result)] == ["pages/a.txt", "pages/b.html", "pages/deep/c.htm.gz"]


def test_every_jsonl_row_is_a_page_of_the_schema(pages):
    result = run("predict", "pages", "--format", "jsonl")

    assert [Page.model_validate(row).text[:19] for row in rows(result)] == ["Minister said talks"] * 3


def test_rows_keep_the_order_given_with_failures_between_them(pages):
    (pages / "bad.gz").write_bytes(gzip.compress(HTML.encode())[:-20])

    result = run("predict", "none.html", "pages/b.html", "pages/bad.gz", "pages/a.txt", "gone", "--format", "jsonl")

    assert [(row["source"], "error" in row) for row in rows(result)] == [
        ("none.html", True),
        ("pages/b.html", False),
        ("pages/bad.gz", True),
        ("pages/a.txt", False),
        ("gone", True),
    ]
    assert result.exit_code == 1
    assert "3 of 5 pages could not be read" in result.stderr


def test_json_is_one_array_with_failures_in_it(pages):
    result = run("predict", "none.html", "pages/b.html", "gone", "--format", "json")

    assert ["error" in row for row in json.loads(result.stdout)] == [True, False, True]


def test_a_pattern_that_the_shell_left_alone_is_expanded(pages):
    result = run("predict", "pages/**/*.ht*", "--format", "jsonl")

    assert [row["source"] for row in rows(result)] == ["pages/b.html", "pages/deep/c.htm.gz"]


def test_links_to_folders_are_followed_and_each_real_folder_is_read_once(pages, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.html").write_text(HTML)
    (pages / "away").symlink_to(tmp_path / "elsewhere")
    (pages / "again").symlink_to("deep")
    for name in ("one", "two"):  # glob would run through them in every order
        (pages / name).symlink_to(".")
    found = ["pages/a.txt", "pages/away/d.html", "pages/b.html", "pages/deep/c.htm.gz"]

    assert find_pages(["pages"]) == found
    assert find_pages(["pages/**/*.*t*"]) == found
    assert find_pages(["pa*/**/d*"]) == ["pages/away/d.html", "pages/deep/c.htm.gz"]
    assert find_pages(["**/*.html"]) == ["elsewhere/d.html", "pages/b.html"]


def test_a_pattern_passes_over_hidden_folders(pages):
    (pages / ".git").mkdir()
    (pages / ".git" / "d.html").write_text(HTML)

    assert find_pages(["**/*.html"]) == ["pages/b.html"]


def test_a_pattern_without_a_match_fails_beside_others_that_match(pages):
    result = run("predict", "*.xml", "pages/b.html", "--format", "jsonl")

    assert result.exit_code == 1
    assert rows(result)[0] == {"source": "*.xml", "error": "nothing matches *.xml: check the path"}


def test_a_file_named_like_a_pattern_is_taken_literally(pages):
    (pages / "[1].html").write_text(HTML)

    assert find_pages(["pages/[1].html"]) == ["pages/[1].html"]


@pytest.mark.parametrize("path", ["*.xml", "pages/empty"])
def test_nothing_to_read_is_a_usage_error_that_names_the_path(pages, path):
    (pages / "empty").mkdir()

    result = run("predict", path)

    assert result.exit_code == 2
    assert path in result.stderr


def test_a_folder_that_cannot_be_listed_is_a_row(pages, monkeypatch):
    real = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)  # as root, every folder can be listed

    found = find_pages(["pages"])

    assert found[:2] == ["pages/a.txt", "pages/b.html"]
    assert isinstance(found[2], FailedPage)
    assert "Permission denied" in found[2].error


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_standard_input_may_be_packed(pages, pack):
    result = run("predict", "-", "--format", "jsonl", stdin=pack(HTML.encode()))

    assert [(row["source"], row["text"][:8]) for row in rows(result)] == [("-", "Minister")]


def test_closed_standard_input_is_a_row(pages, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)

    with pytest.raises(InputError, match="standard input is closed: pipe a page into it"):
        read_bytes("-", max_bytes=1_000)


def test_standard_input_is_read_once_only(pages):
    assert run("predict", "-", "-").exit_code == 2


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_page_as_long_as_the_limit_is_read_and_a_longer_one_refused(tmp_path, pack):
    file = tmp_path / "page"
    file.write_bytes(pack(b"x" * 1_000))

    assert read_bytes(str(file), max_bytes=1_000) == b"x" * 1_000
    with pytest.raises(InputError, match="more than 999 bytes"):
        read_bytes(str(file), max_bytes=999)


def test_a_gzip_bomb_is_not_unpacked_beyond_the_limit(tmp_path, monkeypatch):
    file = tmp_path / "bomb.gz"
    file.write_bytes(gzip.compress(bytes(64 * 2**20)))
    unpacked = 0
    real = gzip.GzipFile.read

    def count(self, size=-1):
        nonlocal unpacked
        data = real(self, size)
        unpacked += len(data)
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", count)

    with pytest.raises(InputError, match="raise --max-bytes"):
        read_bytes(str(file), max_bytes=10_000)
    assert unpacked == 10_001


# Named, for gzip writes the second into its bytes, and processes that test side by side need the same names.
@pytest.mark.parametrize(
    "content",
    [b"", b"plain", gzip.compress(b"page")[:-5], b"\x1f\x8b\x08\x00garbage of a file"],
    ids=["empty", "plain", "cut short", "garbage"],
)
def test_a_broken_gz_file_says_so(tmp_path, content):
    file = tmp_path / "page.html.gz"
    file.write_bytes(content)

    with pytest.raises(InputError, match="broken gzip"):
        read_bytes(str(file), max_bytes=1_000)


@pytest.mark.parametrize("option", ["--max-sections", "--max-depth", "--max-bytes"])
def test_a_page_over_a_limit_is_a_row(pages, option):
    (pages / "b.html").write_text("<div>" * 5 + HTML + HTML)

    result = run("predict", "pages/b.html", "--format", "jsonl", option, "3")

    assert result.exit_code == 1
    assert "limit" in rows(result)[0]["error"]


def test_a_name_that_is_no_utf8_is_written_readably(pages):
    Path(os.fsdecode(b"pages/\xff.html")).write_text(HTML)

    result = run("predict", "pages", "--format", "jsonl")

    assert result.exit_code == 0
    assert rows(result)[-1]["source"] == "pages/\ufffd.html"


def test_a_page_on_which_the_model_fails_takes_no_other_page_with_it(pages, tiny_model, monkeypatch):
    predictor = copydesk.load(tiny_model)
    real = predictor.section_logits

    def fail_on_three_sections(encoded):
        if any(len(page) == 3 for page in encoded):
            raise RuntimeError("out of memory")
        return real(encoded)

    monkeypatch.setattr(predictor, "section_logits", fail_on_three_sections)
    predictor.max_batch_tokens = 1  # the page that is waiting when a batch fails must not be lost

    answers = list(predict_pages(predictor, [*find_pages(["pages"]), "gone", "pages/a.txt"]))

    assert [(answer.source, isinstance(answer, Page)) for answer in answers] == [
        ("pages/a.txt", True),
        ("pages/b.html", False),
        ("pages/deep/c.htm.gz", False),
        ("gone", False),
        ("pages/a.txt", True),
    ]
    assert "RuntimeError: out of memory" in answers[1].error


def test_pages_are_read_as_they_are_asked_for(pages, tiny_model):
    predictor = copydesk.load(tiny_model)
    predictor.max_batch_tokens = 1
    asked = []

    def sources():
        for i in range(100):
            asked.append(i)
            yield "pages/a.txt"

    next(predict_pages(predictor, sources()))

    assert len(asked) == 2


def test_a_json_line_stays_one_line_to_every_reader(pages):
    (pages / "b.html").write_text("<p>one\u2028two\u0085three \x9b31m</p>")

    result = run("predict", "pages/b.html", "--format", "jsonl")

    assert len(result.stdout.splitlines()) == 1
    assert rows(result)[0]["text"] == "one two three \x9b31m"


def test_output_replaces_a_file_when_all_is_done(pages, tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("old")

    result = run("predict", "pages", "gone", "--format", "jsonl", "--output", target)

    assert (result.exit_code, result.stdout) == (1, "")
    assert len(target.read_text().splitlines()) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "pages"]


def test_output_stays_as_it_was_after_a_crash(pages, tmp_path, monkeypatch):
    target = tmp_path / "out.jsonl"
    target.write_text("old")
    monkeypatch.setattr(Page, "model_dump_json", lambda self: 1 / 0)

    result = run("predict", "pages", "--format", "jsonl", "--output", target)

    assert isinstance(result.exception, ZeroDivisionError)
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "pages"]


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_output_keeps_the_mode_of_the_file_that_it_replaces(pages, tmp_path, monkeypatch, mode):
    target = tmp_path / "out.jsonl"
    target.touch()
    target.chmod(mode)
    before_a_row = []
    real = Page.model_dump_json

    def look(page):
        before_a_row.extend(stat.S_IMODE(part.stat().st_mode) for part in tmp_path.glob(".*.part"))
        return real(page)

    monkeypatch.setattr(Page, "model_dump_json", look)

    assert run("predict", "pages/b.html", "--format", "jsonl", "--output", target).exit_code == 0
    assert [*before_a_row, stat.S_IMODE(target.stat().st_mode)] == [mode, mode]


def test_output_may_be_a_pipe_by_the_name_of_its_descriptor(pages):
    process = start("predict", "pages/b.html", "--format", "jsonl", "--output", "/dev/stdout")

    output, errors = process.communicate(timeout=60)

    assert (process.returncode, errors) == (0, b"")
    assert json.loads(output)["source"] == "pages/b.html"


def test_output_that_cannot_be_written_says_what_to_do(pages):
    result = run("predict", "pages", "--output", "nowhere/out.txt")

    assert result.exit_code == 2
    assert "name a file in a folder that exists" in result.stderr


def test_a_missing_model_is_named_without_a_traceback(pages):
    result = run("predict", "pages", "--model", "nowhere")

    assert result.exit_code == 2
    assert result.stderr.startswith("error: there is no model folder nowhere")


def test_without_any_model_the_error_says_how_to_get_one(pages, monkeypatch):
    monkeypatch.delenv("COPYDESK_MODEL")
    monkeypatch.setattr("copydesk.console.__file__", str(pages / "copydesk" / "cli.py"))

    result = run("predict", "pages")

    assert result.exit_code == 2
    for word in ("make demo", "--model", "COPYDESK_MODEL"):
        assert word in result.stderr


def test_the_released_model_of_the_current_folder_is_the_default(pages, tmp_path, tiny_model, monkeypatch):
    monkeypatch.delenv("COPYDESK_MODEL")
    monkeypatch.setattr("copydesk.console.__file__", str(pages / "copydesk" / "cli.py"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "released").symlink_to(tiny_model)

    assert run("predict", "pages").exit_code == 0


def test_text_reads_without_colour(pages):
    result = run("predict", "pages/b.html", "gone")

    assert "\x1b" not in result.stdout
    assert re.search(
        r"^(headline|body|boilerplate|paywall|sponsored) +The goal of the match today\.$", result.stdout, re.MULTILINE
    )
    assert re.search(r"^failed +gone: cannot be read", result.stdout, re.MULTILINE)
    assert result.exit_code == 1


def test_info_says_what_a_model_is(tiny_model):
    result = run("info", tiny_model)

    assert result.exit_code == 0
    for word in ("tiny", "2026-01-01", "standalone", "international relations", "0.100", "weights.safetensors", "bert"):
        assert word in result.stdout


def test_info_as_json_holds_topics_with_thresholds_and_files_with_sizes(tiny_model):
    facts = json.loads(run("info", tiny_model, "--json").stdout)

    assert [topic["threshold"] for topic in facts["topics"]] == [0.9, 0.1, 0.9]
    assert facts["files"]["tokenizer.json"]["bytes"] == (tiny_model / "tokenizer.json").stat().st_size
    assert (facts["standalone"], facts["base"]) == (True, None)


def test_info_about_no_model_gives_up(tmp_path):
    result = run("info", tmp_path)

    assert result.exit_code == 2
    assert "manifest.json" in result.stderr


def test_export_writes_a_model_that_predicts(pages, tmp_path, tiny_model):
    assert run("export", "--standalone", tmp_path / "alone", "--model", tiny_model).exit_code == 0

    assert run("predict", "pages", "--model", tmp_path / "alone").exit_code == 0
    again = run("export", "--standalone", tmp_path / "alone", "--model", tiny_model)
    assert (again.exit_code, "not empty" in again.stderr) == (2, True)


def test_version_is_printed():
    assert run("--version").stdout.startswith("copydesk")


def test_help_waits_for_no_heavy_import():
    code = "import sys, copydesk.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, check=True)

    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["info"], ["info", "--json"], ["predict", "pages"]])
def test_standard_output_that_cannot_be_written_is_an_error(pages, command, monkeypatch, capsys):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        monkeypatch.setattr("sys.argv", ["copydesk", *command])

        with pytest.raises(SystemExit) as ended:
            main()

    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: cannot write to standard output: No space left on device\n"


def test_closed_standard_output_is_an_error(pages, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.argv", ["copydesk", "predict", "pages"])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    assert "standard output is closed: open it, or name a file with --output" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["text", "jsonl"])
def test_a_reader_that_goes_away_ends_the_run_quietly(pages, form):
    process = start("predict", *["pages/b.html"] * 500, "--format", form)

    process.stdout.readline()
    process.stdout.close()

    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_with_128_and_its_number_and_leaves_no_file(pages, tmp_path, number):
    os.mkfifo(tmp_path / "slow")
    at_rest = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, at_rest)  # ignored in the background, also by children
    process = start("predict", "slow", "--output", "out.txt")
    signal.signal(number, before)
    writer = os.open(tmp_path / "slow", os.O_WRONLY)  # returns when the other side reads

    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    os.close(writer)

    assert (process.returncode, errors) == (128 + number, b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pages", "slow"]
