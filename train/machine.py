"""What the machine does while a run lasts.

Knows MLflow's monitors of processor, memory, disk and network; knows nothing of runs.
"""

import itertools
import os
import threading
from collections.abc import Callable

from train.store import machine_monitors


class Watch(threading.Thread):
    """Logs the machine's numbers, each under `system/`, every few seconds."""

    def __init__(self, log_metrics: Callable[[dict[str, float], int], None]) -> None:
        super().__init__(name="watch", daemon=True)
        self._log_metrics, self._stopping = log_metrics, threading.Event()
        self._seconds = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "10"))

    def run(self) -> None:
        """Log until the end."""
        monitors = machine_monitors()
        for step in itertools.count():
            numbers: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                numbers |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            self._log_metrics({f"system/{name}": value for name, value in numbers.items()}, step)
            if self._stopping.wait(self._seconds):
                return

    def stop(self) -> None:
        """Log no more."""
        self._stopping.set()
        self.join()
