"""Send a journal to the MLflow store, from a thread, however long the store is away.

Knows when to try again and what to say; what an entry is in MLflow, `train.store` knows. No training waits for it.
"""

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from copydesk.registry import tracking_uri
from train.checkpoints import write_whole
from train.journal import ROOT, Entry, Journal, JournalError, first_entry, journals
from train.store import connect, is_busy, is_refusal, open_run, write

log = logging.getLogger(__name__)

_LONGEST_PAUSE = 60.0
"""Seconds between attempts at a store that is away."""
_QUICK = 1.0
"""Seconds within which a store must have refused for one more attempt to be worth it at the end."""
_BUSY_TRIES = 5
"""How often a store that is there but busy is asked again, within three seconds, before it counts as away."""
_STUCK = 60.0
"""Seconds without an entry sent after which the end of a run waits no longer."""


def send_all(journal: Journal, *, uri: str = "") -> int:
    """Send what waits, in order; return how many entries the store refused for good, which is said of each kind once.

    Args:
        journal: what to send from.
        uri: of the store, if not that of the environment.

    Raises:
        Exception: the store is away. What was sent until then is noted.
    """
    store, experiment_id = connect(uri)
    refused: list[str] = []

    def send(entries: list[Entry]) -> None:
        entry = _joined(entries)
        try:
            if entry["kind"] == "open":
                journal.run_id = open_run(store, experiment_id, {**entry, "run_id": journal.run_id or entry["run_id"]})
                _note_id(journal, Path(entry["record"]))
            else:
                write(store, journal.run_id, entry, files=journal.folder)
        except Exception as error:
            if not is_refusal(error) or entry["kind"] == "open":  # without a run all else would be lost
                raise
            if len(entries) > 1:  # find out which
                for one in entries:
                    send([one])
                return
            if entry["kind"] not in refused:
                log.warning("MLflow did not take %s, further such failures are not reported: %s", entry["kind"], error)
            refused.append(entry["kind"])
        journal.sent(len(entries), run_id=journal.run_id)

    for entries in _calls(journal.waiting()):
        send(entries)
    return len(refused)


def _note_id(journal: Journal, record: Path) -> None:
    """Write the run's id into the file that later stages read, if that is still about this run."""
    try:
        known = json.loads(record.read_text("utf-8"))
        if known["journal"] == journal.folder.name and known["run_id"] != journal.run_id:
            write_whole(record, {**known, "run_id": journal.run_id})
    except (OSError, ValueError, KeyError) as error:
        log.debug("%s is about no run any more: %s", record, error)


def _calls(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Yield entries that go in one call: metrics together, all else one by one."""
    for kind, group in itertools.groupby(entries, key=lambda entry: entry["kind"]):
        together = list(group)
        size = 100 if kind == "metrics" else 1
        yield from (together[start : start + size] for start in range(0, len(together), size))


def _joined(entries: list[Entry]) -> Entry:
    if len(entries) == 1:
        return entries[0]
    return {"kind": entries[0]["kind"], "rows": [row for entry in entries for row in entry["rows"]]}


class Sender(threading.Thread):
    """Sends a journal as it grows."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(name="sender", daemon=True)  # a process that must end does not wait for a store
        self.journal, self.uri = journal, tracking_uri()
        self._more, self._ending = threading.Event(), threading.Event()
        self._said = False
        self.is_away = False
        """Whether the last attempt failed."""

    def run(self) -> None:
        """Send until the end; what cannot be sent waits on disk."""
        pause, num_busy = 1.0, 0
        while True:
            self._more.clear()
            ending = self._ending.is_set()  # after the line above: else the end may be slept through
            began = time.monotonic()
            try:
                if self.journal.waiting():
                    send_all(self.journal, uri=self.uri)
                self.is_away, pause, num_busy = False, 1.0, 0
            except Exception as error:  # noqa: BLE001 (hours of training are worth more than their log)
                if is_busy(error) and num_busy < _BUSY_TRIES:
                    num_busy += 1
                    time.sleep(0.2 * num_busy)
                    continue
                self.is_away = True
                self._say(error)
                if ending or (self._ending.wait(pause) and time.monotonic() - began > _QUICK + pause):
                    return
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            if self.journal.waiting():
                continue
            if ending:
                return
            self._more.wait()

    def _say(self, error: Exception) -> None:
        if not self._said:
            log.warning(
                "the MLflow store %s is away, going on without it: %s. What is logged waits in %s; "
                "what is not sent by the end, `python -m train.tracking replay` sends later",
                self.uri,
                error,
                self.journal.folder,
            )
        self._said = True

    def wake(self) -> None:
        """Say that there is more to send."""
        self._more.set()

    def flush(self, *, seconds: float = 60.0) -> bool:
        """Wait until all is sent or the store is away; tell which."""
        deadline = time.monotonic() + seconds
        while self.journal.waiting() and self.is_alive() and not self.is_away and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.journal.waiting()

    def go_on(self) -> bool:
        """Take `finish` back; tell whether the thread is still there."""
        self._ending.clear()
        self.join(0.1)  # it may be about to end
        return self.is_alive()

    def finish(self) -> None:
        """Send what can be sent, and stop."""
        self._ending.set()
        self._more.set()
        sent, since = self.journal.num_sent, time.monotonic()
        while self.is_alive() and time.monotonic() - since < _STUCK:
            self.join(0.05)
            if self.journal.num_sent != sent:
                sent, since = self.journal.num_sent, time.monotonic()


def replay(root: Path = ROOT, *, wanted: Callable[[Entry], bool] = lambda _: True) -> tuple[int, int]:
    """Send what waits in journals; return how many entries were sent and how many wait still.

    Args:
        root: folder of all journals.
        wanted: tells of a journal's first entry whether it is to be sent; others are not even opened.
    """
    num_sent = num_waiting = 0
    for folder in journals(root):
        try:
            if not wanted(first_entry(folder)):
                continue
            journal = Journal(folder)
        except FileNotFoundError:  # another process has sent it
            continue
        except JournalError as error:
            log.warning("%s", error)
            continue
        before = len(journal.waiting())
        try:
            send_all(journal)
        except Exception as error:  # noqa: BLE001 (the others may have another fate)
            log.warning("%s still waits: %s", folder, error)
        num_sent += before - len(journal.waiting())
        num_waiting += len(journal.waiting())
        journal.close()
    return num_sent, num_waiting
