"""The command `copydesk serve`: its options.

Knows options and what stands in a key file; imports nothing heavy before it runs.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from copydesk.console import give_up, model_folder
from copydesk.serve.settings import Settings

_LIMITS, _TIMES, _SERVICE = "Limits", "Times, in seconds", "Service"
_DEFAULT = Settings()
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _limit(name: str, text: str) -> Any:
    return typer.Option(f"--{name}", min=1, help=text, rich_help_panel=_LIMITS)


def _time(name: str, text: str, *, least: float = 0.1) -> Any:
    return typer.Option(f"--{name}", min=least, help=text, rich_help_panel=_TIMES)


def serve(  # noqa: PLR0913 (an argument an option)
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URI",
            envvar="COPYDESK_MODEL",
            help="Model folder, or an address in an MLflow registry such as models:/copydesk@champion. Without it: "
            "models/released of the checkout, or of the current folder.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other machines reach 0.0.0.0.", rich_help_panel=_SERVICE)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.", rich_help_panel=_SERVICE)] = 8_080,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="Where to compute; auto takes CUDA where there is one.", rich_help_panel=_SERVICE),
    ] = "auto",
    precision: Annotated[
        Literal["auto", "int8", "bfloat16", "float32"],
        typer.Option(help="What the text encoder computes in; auto takes the fastest.", rich_help_panel=_SERVICE),
    ] = "auto",
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="COPYDESK_API_KEY_FILE",
            help="File with a key a line. Requests have to show one of them, as `Authorization: Bearer KEY` or "
            "`X-API-Key: KEY`.",
            show_default=False,
            rich_help_panel=_SERVICE,
        ),
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(help="Of the JSON lines on standard error; info logs each request.", rich_help_panel=_SERVICE),
    ] = "info",
    max_body: Annotated[int, _limit("max-body", "Bytes of a request, unpacked.")] = _DEFAULT.max_body,
    max_page: Annotated[int, _limit("max-page", "Bytes of a page.")] = _DEFAULT.max_page,
    max_sections: Annotated[int, _limit("max-sections", "Sections of a page.")] = _DEFAULT.max_sections,
    max_depth: Annotated[int, _limit("max-depth", "Depth to which a page nests elements.")] = _DEFAULT.max_depth,
    max_pages: Annotated[int, _limit("max-pages", "Pages of a request.")] = _DEFAULT.max_pages,
    max_waiting: Annotated[
        int, _limit("max-waiting", "Pages accepted and not yet answered; above it requests get 429.")
    ] = _DEFAULT.max_waiting,
    max_held: Annotated[int, _limit("max-held", "Bytes of all requests under way.")] = _DEFAULT.max_held,
    max_connections: Annotated[
        int, _limit("max-connections", "Open connections; above it requests get 503.")
    ] = _DEFAULT.max_connections,
    batch_tokens: Annotated[
        int, _limit("batch-tokens", "Tokens that the network reads at once.")
    ] = _DEFAULT.batch_tokens,
    lanes: Annotated[int, _limit("lanes", "Batches read at once; they share the cores.")] = _DEFAULT.lanes,
    timeout: Annotated[float, _time("timeout", "To answer a request; after it 503.")] = _DEFAULT.timeout,
    read_timeout: Annotated[
        float, _time("read-timeout", "For a request's body, or a stream's next line, to arrive; after it 408.")
    ] = _DEFAULT.read_timeout,
    grace: Annotated[float, _time("grace", "To finish what was accepted, after SIGTERM.")] = _DEFAULT.grace,
    watch: Annotated[
        float, _time("watch", "Between two looks whether the registry's alias moved; 0 never looks.", least=0)
    ] = _DEFAULT.watch,
) -> None:
    """Serve a model over HTTP, with a playground at / and documentation at /docs.

    SIGTERM ends it when what was accepted is answered; SIGHUP loads the model again without dropping a request.

    Exit status: 0 all was answered, 1 not within the grace time, 2 it could not start.
    """
    address = model if model and model.startswith("models:/") else str(model_folder(model))
    try:
        settings = Settings(
            max_body=max_body,
            max_page=max_page,
            max_sections=max_sections,
            max_depth=max_depth,
            max_pages=max_pages,
            max_waiting=max_waiting,
            max_held=max_held,
            max_connections=max_connections,
            batch_tokens=batch_tokens,
            lanes=lanes,
            stream_window=min(_DEFAULT.stream_window, max_waiting),
            timeout=timeout,
            read_timeout=read_timeout,
            grace=grace,
            watch=watch,
        )
        keys = read_keys(api_key_file) if api_key_file else []
    except (ValueError, OSError) as error:
        give_up(error)
    if host not in _LOOPBACK and not keys:
        typer.echo(f"warning: {host} may be reached from other machines, and no --api-key-file is given", err=True)
    computing = {"device": device, "precision": precision}
    raise typer.Exit(_run(address, settings, computing, host=host, port=port, keys=keys, log_level=log_level))


def _run(address: str, settings: Settings, computing: dict[str, Any], **options: Any) -> int:
    try:
        from copydesk.serve.server import serve as run
    except ModuleNotFoundError as error:
        give_up(f"{error}: the service needs an extra, pip install 'copydesk[serve]'")
    from copydesk.serve.source import ModelSource
    from copydesk.split import Limits

    limits = Limits(max_bytes=settings.max_page, max_sections=settings.max_sections, max_depth=settings.max_depth)
    try:
        return run(ModelSource(address, **computing, limits=limits), settings, **options)
    except (ValueError, OSError) as error:  # ModelError, EncoderError, RegistryError, an address that is taken
        give_up(error)


def read_keys(path: Path) -> list[str]:
    """Return the keys of a file, one a line; blank lines and those that begin with # are none.

    Raises:
        OSError: it cannot be read.
        ValueError: it has none, or one that no header can carry.
    """
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or not all(key.isascii() and key.isprintable() for key in keys):
        raise ValueError(f"{path} has {len(keys)} keys, expected at least one, of printable ASCII characters")
    return keys
