"""What waits to be logged, on disk: entries in their order, the files that they name, how far they were sent.

Knows one folder a run and that it survives the process; knows nothing of where entries go.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.checkpoints import write_whole

ROOT = Path("mljournal")
"""Below the working folder, as the store is."""
_ENTRIES, _SENT, _FILES = "entries.jsonl", "sent.json", "files"
Entry = dict[str, Any]


class JournalError(OSError):
    """A journal cannot be opened. The message says why."""


class Journal:
    """The entries of one run. One process at a time has it open, and in it one thread sends while others add."""

    def __init__(self, folder: Path) -> None:
        """Open a journal, made where it is missing.

        Raises:
            JournalError: another process has it open.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder = folder.absolute()
        self._file = (folder / _ENTRIES).open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise JournalError(f"{folder} is open in another process: wait until that ends") from error
        self._lock = threading.Lock()
        self.entries: list[Entry] = []
        self.num_sent, self.run_id = 0, ""
        self._read()

    def _read(self) -> None:
        content = (self.folder / _ENTRIES).read_bytes()
        whole = content.rpartition(b"\n")[0]
        if len(whole) < len(content):  # the end of a line that a process died over is no entry
            self._file.truncate(len(whole) + bool(whole))
        self.entries = [json.loads(line) for line in whole.splitlines()]
        if (self.folder / _SENT).is_file():
            sent = json.loads((self.folder / _SENT).read_text("utf-8"))
            self.num_sent, self.run_id = sent["entries"], sent["run_id"]

    def add(self, kind: str, **content: Any) -> None:
        """Append an entry.

        Raises:
            OSError: the disk is full.
        """
        entry = {"kind": kind, **content}
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            size = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._file.truncate(size)  # half a line would spoil the next
                raise
            self.entries.append(entry)

    def waiting(self) -> list[Entry]:
        """Return what was not sent yet, oldest first."""
        return self.entries[self.num_sent :]

    def sent(self, count: int, *, run_id: str) -> None:
        """Note that so many more entries were sent, to this run of the store."""
        self.num_sent, self.run_id = self.num_sent + count, run_id
        write_whole(self.folder / _SENT, {"entries": self.num_sent, "run_id": run_id})

    def new_file(self, name: str) -> Path:
        """Return where a file, or a folder, that goes with an entry may be written."""
        folder = self.folder / _FILES / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder / name

    def keep(self, path: Path) -> Path:
        """Keep a file or folder as it is now, by hard links where the disk allows it; return where."""
        kept = self.new_file(path.name)
        if path.is_dir():
            shutil.copytree(path, kept, copy_function=_link_or_copy)
        else:
            _link_or_copy(path, kept)
        return kept

    @property
    def is_closed(self) -> bool:
        """Whether the run has ended, as far as is known."""
        return bool(self.entries) and self.entries[-1]["kind"] == "close"

    def close(self) -> None:
        """Leave it to other processes; with the run ended and all sent, it is deleted."""
        if self.is_closed and not self.waiting():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._file.close()


def _link_or_copy(source: Path | str, target: Path | str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copy2(source, target)


def journals(root: Path = ROOT) -> Iterator[Path]:
    """Yield the folders of all journals, oldest first; those of runs that stand under another one come last."""
    found = []
    for path in root.glob(f"*/{_ENTRIES}"):
        with suppress(FileNotFoundError):  # all was sent meanwhile
            found.append(("parent" in first_entry(path.parent), path.parent.stat().st_ctime, path.parent))
    yield from (folder for _, _, folder in sorted(found))


def first_entry(folder: Path) -> Entry:
    """Return what a journal begins with, in which its run is described; nothing where that was not written whole.

    Raises:
        FileNotFoundError: it is not there any more.
    """
    with (folder / _ENTRIES).open("rb") as file:
        first = file.readline()
    entry: Entry = json.loads(first) if first.endswith(b"\n") else {}
    return entry
