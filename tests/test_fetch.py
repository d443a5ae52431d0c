import gzip
import hashlib
import json
import logging
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from train.fetch import FetchError, Sources, fetch, main, read_sources

PAGES = {"one": b"<p>one</p>", "two": b"<p>zwei \xfc</p>", "deep/three": b"<p>three</p>"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git(folder: Path, *arguments: str) -> str:
    author = {f"GIT_{who}_{what}": "test@example.test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=kept | author | {"GIT_CONFIG_GLOBAL": os.devnull},
    )
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def upstream(tmp_path) -> tuple[Path, str]:
    """A bare repository with the pages, packed or not, in a commit that is no longer the newest."""
    work, bare = tmp_path / "work", tmp_path / "upstream.git"
    (work / "html" / "deep").mkdir(parents=True)
    git(work, "init", "--quiet")
    (work / ".gitattributes").write_text("* text=auto eol=crlf\n")  # must not touch what is fetched
    for name, data in PAGES.items():
        if name == "two":
            (work / "html" / "two.html.gz").write_bytes(gzip.compress(data))
        else:
            (work / "html" / f"{name}.html").write_bytes(data)
    git(work, "add", ".")
    git(work, "commit", "--quiet", "-m", "pages")
    commit = git(work, "rev-parse", "HEAD")
    (work / "html" / "one.html").write_bytes(b"<p>one, corrected</p>")
    git(work, "commit", "--quiet", "-am", "later")
    git(tmp_path, "clone", "--quiet", "--bare", str(work), str(bare))
    return bare, commit


def annotation(name: str, **changes: str) -> dict[str, str]:
    packed = ".gz" if name == "two" else ""
    entry = {"page": f"paper/{name}", "file": f"html/{name}.html{packed}", "html_sha256": sha256(PAGES[name])}
    return entry | changes


def sources_for(upstream: tuple[Path, str], annotations: list[dict[str, str]], **changes: str) -> Sources:
    content = "".join(json.dumps(entry) + "\n" for entry in annotations).encode()
    Path("paper.jsonl").write_bytes(content)
    source = {
        "repository": upstream[0].as_uri(),
        "commit": upstream[1],
        "licence": "CC0",
        "terms": "written for this test",
        "annotations": "paper.jsonl",
        "annotations_sha256": sha256(content),
        "folder": "pages/paper",
    }
    Path("sources.yaml").write_text(yaml.safe_dump({"pages": {"paper": source | changes}}))
    return read_sources(Path("sources.yaml"))


def written() -> dict[str, bytes]:
    folder = Path("pages/paper")
    return {
        path.relative_to(folder).as_posix().removesuffix(".html.gz"): gzip.decompress(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("filters", ["true", "false"])
def test_pages_are_fetched_as_they_were_at_the_commit(upstream, filters):
    git(upstream[0], "config", "uploadpack.allowFilter", filters)

    assert fetch(sources_for(upstream, [annotation(name) for name in PAGES])) == []
    assert written() == PAGES


def test_a_server_that_gives_only_branches_is_asked_for_its_history(upstream, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")  # the old protocol refuses a commit by its checksum
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "protocol.version")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "0")

    assert fetch(sources_for(upstream, [annotation("one")])) == []
    assert written() == {"one": PAGES["one"]}


def test_a_second_run_writes_nothing_and_asks_nobody(upstream, caplog):
    sources = sources_for(upstream, [annotation(name) for name in PAGES])
    fetch(sources)
    before = {path: path.stat().st_mtime_ns for path in Path("pages").rglob("*.gz")}
    upstream[0].rename("gone.git")

    with caplog.at_level(logging.INFO):
        assert fetch(sources) == []
    assert {path: path.stat().st_mtime_ns for path in Path("pages").rglob("*.gz")} == before
    assert "all 3 pages are there, nothing to do" in caplog.text


def test_an_altered_page_is_fetched_again(upstream):
    sources = sources_for(upstream, [annotation("one")])
    fetch(sources)
    Path("pages/paper/one.html.gz").write_bytes(b"cut off")

    assert fetch(sources) == []
    assert written() == {"one": PAGES["one"]}


def test_a_page_with_another_checksum_is_named_and_the_others_are_written(upstream):
    wrong = annotation("one", html_sha256="0" * 64)

    (fault,) = fetch(sources_for(upstream, [wrong, annotation("two")]))
    assert fault.startswith(f"paper/one: expected sha256 {'0' * 64}, got {sha256(PAGES['one'])}")
    assert written() == {"two": PAGES["two"]}


def test_a_file_that_is_not_in_the_commit_is_named_and_the_others_are_written(upstream):
    gone = annotation("one", file="html/moved.html")

    (fault,) = fetch(sources_for(upstream, [gone, annotation("two")]))
    assert "paper/one: html/moved.html" in fault
    assert "is not there" in fault
    assert written() == {"two": PAGES["two"]}


def test_an_unknown_commit_says_so_and_what_to_do(upstream):
    (fault,) = fetch(sources_for(upstream, [annotation("one")], commit="1" * 40))

    assert f"does not give commit {'1' * 40}" in fault
    assert "--from" in fault


def test_an_unreachable_repository_says_so_and_what_to_do(upstream, tmp_path):
    (fault,) = fetch(sources_for(upstream, [annotation("one")], repository=(tmp_path / "none").as_uri()))

    assert "cannot be reached" in fault
    assert "--from" in fault


def test_changed_annotations_are_not_paired_with_the_commit(upstream):
    sources = sources_for(upstream, [annotation("one")])
    Path("paper.jsonl").write_text(json.dumps(annotation("two")) + "\n")

    (fault,) = fetch(sources)
    assert "paper.jsonl has sha256" in fault
    assert not Path("pages").exists()


def test_a_page_name_cannot_leave_its_folder(upstream):
    (fault,) = fetch(sources_for(upstream, [annotation("one", page="paper/../../outside")]))

    assert "expected SOURCE/NAME" in fault


def test_an_interrupted_write_leaves_no_half_file(upstream, monkeypatch):
    def interrupted(self, target):
        raise KeyboardInterrupt

    sources = sources_for(upstream, [annotation("one")])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(sources)
    assert written() == {}

    assert fetch(sources) == []
    assert written() == {"one": PAGES["one"]}


def test_the_same_page_always_makes_the_same_file(upstream, tmp_path):
    sources = sources_for(upstream, [annotation("one")])
    fetch(sources)
    first = Path("pages/paper/one.html.gz").read_bytes()
    copy = tmp_path / "local" / "paper" / "one.html.gz"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(gzip.compress(PAGES["one"], 1, mtime=12345))
    Path("pages/paper/one.html.gz").unlink()

    assert fetch(sources, folder=tmp_path / "local") == []
    assert Path("pages/paper/one.html.gz").read_bytes() == first


@pytest.mark.parametrize("layout", ["paper", "pages/paper"])
def test_a_local_folder_stands_in_for_the_repository(upstream, tmp_path, layout):
    for name, data in PAGES.items():
        path = tmp_path / "local" / layout / f"{name}.html.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data if name != "one" else b"another version"))
    sources = sources_for(upstream, [annotation(name) for name in PAGES], repository="file:///nowhere")

    (fault,) = fetch(sources, folder=tmp_path / "local")
    assert fault.startswith("paper/one: expected sha256")
    assert written() == {name: data for name, data in PAGES.items() if name != "one"}


def test_a_local_folder_without_the_source_says_where_it_looked(upstream, tmp_path):
    (tmp_path / "local").mkdir()

    (fault,) = fetch(sources_for(upstream, [annotation("one")]), folder=tmp_path / "local")
    assert str(tmp_path / "local" / "paper") in fault


def judged_sources(data: bytes) -> Sources:
    entry = {"file": "articles/judged.jsonl.gz", "sha256": sha256(data), "licence": "none", "terms": "Theirs."}
    found_as = ["judged.jsonl.gz", "topics/labelled.jsonl.gz"]
    return Sources.model_validate({"pages": {}, "articles": {"judged": entry | {"found_as": found_as}}})


def test_articles_without_a_download_are_no_fault_but_are_announced(caplog):
    assert fetch(judged_sources(b"{}\n")) == []
    assert "no public download" in caplog.text
    assert "--set prepare.articles=[]" in caplog.text


@pytest.mark.parametrize("place", ["judged.jsonl.gz", "topics/labelled.jsonl.gz"])
def test_articles_come_from_a_local_folder(tmp_path, place):
    path = tmp_path / "local" / place
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(b"{}\n"))

    assert fetch(judged_sources(b"{}\n"), folder=tmp_path / "local") == []
    assert gzip.decompress(Path("articles/judged.jsonl.gz").read_bytes()) == b"{}\n"


def test_other_articles_are_not_taken(tmp_path):
    (tmp_path / "judged.jsonl.gz").write_bytes(gzip.compress(b"others\n"))

    (fault,) = fetch(judged_sources(b"{}\n"), folder=tmp_path)
    assert f"expected sha256 {sha256(b'{}' + chr(10).encode())}, got {sha256(b'others' + chr(10).encode())}" in fault
    assert not Path("articles/judged.jsonl.gz").exists()


def test_an_unknown_source_is_refused_by_name(upstream):
    with pytest.raises(FetchError, match="unknown source nosuch, expected one of paper"):
        fetch(sources_for(upstream, [annotation("one")]), only=["nosuch"])


def test_the_command_ends_with_status_1_on_a_fault(upstream, caplog):
    sources_for(upstream, [annotation("one", html_sha256="0" * 64)])

    with pytest.raises(SystemExit) as end:
        main(["--sources", "sources.yaml"])
    assert str(end.value) == "fetch: 1 fault(s), listed above"
    assert "paper/one" in caplog.text


def test_the_shipped_list_fits_the_shipped_annotations():
    root = Path(__file__).parents[1]
    for source in read_sources(root / "data" / "sources.yaml").pages.values():
        assert sha256((root / source.annotations).read_bytes()) == source.annotations_sha256
