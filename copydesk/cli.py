"""The command line: `copydesk predict | serve | info | export`.

Knows options, terminals and exit codes; knows nothing of how a page is found, read or labelled.
"""

import contextlib
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO

import typer
from rich.console import Console
from rich.text import Text

from copydesk.console import ModelOption, give_up, model_folder, show_error, stderr
from copydesk.detect import Kind
from copydesk.inputs import InputError, find_pages, predict_pages
from copydesk.page import FailedPage, Page
from copydesk.serve.command import serve
from copydesk.split import Limits
from copydesk.terminal import UNPRINTABLE, megabytes, printable, show_facts, show_pages

if TYPE_CHECKING:  # torch takes a second to import: `--help` and a wrong path do not wait for it
    from copydesk.predictor import Device, Precision, Predictor
    from copydesk.saved import Description, Manifest

Format = Literal["text", "json", "jsonl"]

_SHOWN_BATCH_TOKENS = 4_096
"""Who watches wants the first page soon, not the last."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Read scraped news pages: what is body, boilerplate, paywall or sponsored, and what the article is about.",
)


def main() -> None:
    """Run the command line; end with status 2 if standard output cannot be written, with 1 if its reader went away."""
    try:
        try:
            app(prog_name="copydesk")
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:  # a file's: the commands handle these, so it is a fault of ours
            raise
        # The rest of the buffer cannot be written either, and the interpreter would say so as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        show_error(f"cannot write to standard output: {error.strerror}")
        sys.exit(2)


@app.command(no_args_is_help=True)
def predict(  # noqa: PLR0913 (an argument an option)
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help="Files, folders (searched for .html, .htm and .txt, each also with .gz), patterns such as "
            "'crawl/*.html', or - for standard input.",
            show_default=False,
        ),
    ],
    *,
    model: ModelOption = None,
    format: Annotated[  # noqa: A002 (the option's name)
        Format,
        typer.Option(
            help="text to look at, json for one array, jsonl for one page a line. A page that cannot be read gets "
            "a row with source and error."
        ),
    ] = "text",
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write here instead of standard output. The file appears when all is done, or stays as it was.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[Kind, typer.Option(help="What the pages are; auto looks for tags.")] = "auto",
    device: Annotated[  # restated: copydesk.predictor imports torch
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute; auto takes CUDA where there is one.")
    ] = "auto",
    precision: Annotated[
        Literal["auto", "int8", "bfloat16", "float32"],
        typer.Option(help="What the text encoder computes in; auto takes the fastest."),
    ] = "auto",
    max_bytes: Annotated[int, typer.Option(min=1, help="Refuse a page with more bytes.")] = Limits().max_bytes,
    max_sections: Annotated[int, typer.Option(min=1, help="Refuse a page with more sections.")] = Limits().max_sections,
    max_depth: Annotated[
        int, typer.Option(min=1, help="Refuse a page that nests elements deeper.")
    ] = Limits().max_depth,
) -> None:
    """Label the sections of pages and name their topics.

    Exit status: 0 all pages were read, 1 some were not, 2 nothing could be done.
    """
    limits = Limits(max_bytes=max_bytes, max_sections=max_sections, max_depth=max_depth)
    try:
        sources = find_pages(paths)
    except InputError as error:
        give_up(error)
    folder = model_folder(model)
    failed = 0
    with _opened(output) as stream:
        predictor = _load(folder, device=device, precision=precision, limits=limits)
        if stream.isatty():
            predictor.max_batch_tokens = _SHOWN_BATCH_TOKENS

        def rows() -> Iterator[Page | FailedPage]:
            nonlocal failed
            with _progress(total=len(sources), hidden=stream.isatty()) as advance:
                for row in predict_pages(predictor, sources, kind=kind):
                    failed += isinstance(row, FailedPage)
                    yield row
                    advance()

        _write(rows(), stream, format=format)
    if failed:
        if format != "text" or output:
            stderr().print(Text(f"{failed:,} of {len(sources):,} pages could not be read: see `error` in their rows"))
        raise typer.Exit(1)


app.command()(serve)


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            envvar="COPYDESK_MODEL",
            help="Model folder. Without it: the one that predict would take.",
            show_default=False,
        ),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what a model is, and check that its files are what they were."""
    from copydesk.saved import ModelError, read_description, read_manifest

    folder = model_folder(model)
    try:
        facts = _facts(folder, read_manifest(folder), read_description(folder))
    except (ModelError, OSError) as error:
        give_up(error)
    if as_json:
        import json

        print(json.dumps(facts, indent=1))
    else:
        show_facts(facts, Console(highlight=False))


@app.command(no_args_is_help=True)
def export(
    standalone: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write: new, or empty.", show_default=False)
    ],
    *,
    model: ModelOption = None,
) -> None:
    """Copy a model so that the copy needs no pretrained encoder beside it.

    Weights are stored in bfloat16, so scores may differ slightly.
    """
    from copydesk.encoder import EncoderError
    from copydesk.saved import ModelError, export_standalone

    folder = model_folder(model)
    try:
        manifest = export_standalone(folder, standalone)
    except (ModelError, EncoderError, OSError) as error:
        give_up(error)
    size = sum((standalone / file).stat().st_size for file in manifest.files)
    print(printable(f"{standalone}: {manifest.name} {manifest.version}, {megabytes(size)}"))


def _print_version(value: bool) -> None:  # noqa: FBT001 (as Typer calls it)
    if value:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"copydesk {version('copydesk')}")
        except PackageNotFoundError:
            print("copydesk, run from a checkout that is not installed")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _load(folder: Path, *, device: "Device", precision: "Precision", limits: Limits) -> "Predictor":
    console = stderr()
    with console.status("reading the model") if console.is_terminal else contextlib.nullcontext():
        from copydesk.predictor import load

        try:
            return load(folder, device=device, precision=precision, limits=limits)
        except (ValueError, OSError) as error:  # ModelError, EncoderError, a device that is not there
            give_up(error)


@contextlib.contextmanager
def _opened(output: str | None) -> Iterator[TextIO]:
    """Open standard output, or a file that takes its name when all is written."""
    if output is None or output == "-":
        stream = sys.stdout
        if stream is None:
            give_up("standard output is closed: open it, or name a file with --output")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")
        yield stream
        return
    named = Path(output)
    try:
        if named.exists() and not named.is_file():  # a device or a pipe, whose resolved name may be no path
            with named.open("w", encoding="utf-8", newline="\n") as file:
                yield file
        else:
            with _ended_by_signals(), _replacing(named.resolve()) as file:
                yield file
    except OSError as error:
        give_up(f"cannot write {output} ({error.strerror}): name a file in a folder that exists and is yours to write")


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[TextIO]:
    """Open a file that takes the place, and the mode, of another when all is written."""
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            if target.exists():
                shutil.copymode(target, part)  # whole: the umask has taken its share
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the run as an exception, which closes and removes what is open."""

    def end(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:  # none that is ignored, as under nohup
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _progress(*, total: int, hidden: bool) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error where that is a terminal, and give the function that moves it."""
    console = stderr()
    if hidden or total < 2 or not console.is_terminal:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("pages"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def _write(rows: Iterable[Page | FailedPage], stream: TextIO, *, format: Format) -> None:  # noqa: A002
    if format == "text":
        to_file = stream is not sys.stdout
        console = Console(file=stream, highlight=False, force_terminal=False if to_file else None)
        show_pages(rows, console)
        return
    before = "[\n"
    for row in rows:
        line = _json_line(row)
        stream.write(f"{line}\n" if format == "jsonl" else f"{before}{line}")
        stream.flush()
        before = ",\n"
    if format == "json":
        stream.write("[]\n" if before == "[\n" else "\n]\n")


def _json_line(row: Page | FailedPage) -> str:
    """Return the row as JSON: one line to every reader, and nothing in it that a terminal would obey."""
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", row.model_dump_json())


def _facts(folder: Path, manifest: "Manifest", description: "Description") -> dict[str, Any]:
    base = description.base
    return {
        "name": manifest.name,
        "version": manifest.version,
        "created": manifest.created,
        "run": manifest.run,
        "standalone": base is None,
        "base": base and base.model_dump(include={"name", "sha256"}),
        "network": description.network.model_dump(),
        "encoding": description.encoding.model_dump(),
        "classes": description.classes,
        "section_temperature": description.section_temperature,
        "topic_temperature": description.topic_temperature,
        "headline_share": description.headline_share,
        "topics": [
            {"id": topic.id, "name": topic.name, "parent": topic.parent, "threshold": threshold}
            for topic, threshold in zip(description.topics, description.thresholds, strict=True)
        ],
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256} for name, sha256 in manifest.files.items()
        },
    }


if __name__ == "__main__":
    main()
