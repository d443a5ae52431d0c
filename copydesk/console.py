"""What the commands share: which model they take, and how they give up.

Knows standard error and exit status 2; knows nothing of what a command does.
"""

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from copydesk.terminal import printable

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR",
        envvar="COPYDESK_MODEL",
        help="Model folder. Without it: models/released of the checkout, or of the current folder.",
        show_default=False,
    ),
]


def model_folder(model: str | None) -> Path:
    """Return the folder that is named, or the one that stands where one is looked for."""
    if model:
        return Path(model)
    places = (Path(__file__).parents[1] / "models" / "released", Path("models", "released"))
    for folder in places:
        if folder.is_dir():
            return folder
    give_up(
        f"there is no model: neither --model nor COPYDESK_MODEL names one, and {' and '.join(map(str, places))} do not "
        "exist. Train one with `make demo` in a checkout, or name a model folder with --model DIR or COPYDESK_MODEL=DIR"
    )
    return None


def give_up(reason: object) -> NoReturn:
    """Say why nothing could be done, and end with status 2."""
    show_error(reason)
    raise typer.Exit(2)


def show_error(reason: object) -> None:
    """Say what went wrong."""
    stderr().print(Text.assemble(("error: ", "bold red"), printable(str(reason))))


def stderr() -> Console:
    """Return a console on standard error that wraps nothing."""
    return Console(stderr=True, highlight=False, soft_wrap=True)
