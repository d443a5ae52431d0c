"""Each side of a comparison in a process of its own.

What one side sets up (malloc, threads, caches, patched libraries) must neither help nor hurt another. Knows processes;
knows nothing of what they measure.
"""

import contextlib
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

Sample = dict[str, Any]
"""What one run gave: `seconds`, and whatever else its side counts."""


class SideError(RuntimeError):
    """A side could not be set up or run. The message ends with the reason."""


class Side:
    """Something to measure: set up and warmed up once on entry, run at each call."""

    def __init__(self, make: Callable[..., Callable[[], Sample]], *arguments: Any) -> None:
        """Take what to set up.

        Args:
            make: a function of a module that sets up and warms up, and returns what to run.
            arguments: of `make`; they travel to the other process.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._theirs, make, arguments))
        self._name = f"{make.__module__}.{make.__name__}"

    def __enter__(self) -> Self:
        self._process.start()
        self._theirs.close()  # else the end of the other process would go unnoticed
        try:
            self._answer()
        except SideError:
            self._process.join()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __call__(self) -> Sample:
        """Run once.

        Raises:
            SideError: it failed.
        """
        try:
            self._connection.send("run")
        except OSError as error:
            raise SideError(f"{self._name} is not running: {error}") from error
        return self._answer()

    def _answer(self) -> Sample:
        try:
            sample, error = self._connection.recv()
        except EOFError:
            self._process.join()
            raise SideError(f"{self._name} ended by itself, with exit code {self._process.exitcode}") from None
        if error:
            raise SideError(f"{self._name}: {error}")
        return sample


def _serve(connection: Connection, make: Callable[..., Callable[[], Sample]], arguments: tuple[Any, ...]) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # the table stands alone on standard output
        try:
            run = make(*arguments)
            connection.send(({}, None))
            while connection.recv():
                connection.send((run(), None))
        except EOFError:
            return  # nobody waits any longer
        except Exception:  # noqa: BLE001 (the other process raises it)
            connection.send(({}, traceback.format_exc().strip()))
