"""Vectors of sections that were encoded before: menus and footers come again on the pages of a site.

Knows rows of tokens and their vectors; knows nothing of pages.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np
import torch

Rows = Sequence[Sequence[int]]


class VectorMemory:
    """Keeps the vectors used last. Several threads may use it at once."""

    def __init__(self, max_rows: int, *, width: int, device: torch.device) -> None:
        """Make room.

        Args:
            max_rows: that are kept; with 0 nothing is.
            width: of a vector; one takes 4 bytes a number, and about 200 for its tokens.
            device: where the vectors are.
        """
        self.max_rows = max_rows
        self._vectors = torch.zeros(max_rows, width, device=device)  # taken now, or a service would grow for hours
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first
        self._lock = Lock()

    def vectors(self, rows: Rows, encode: Callable[[Rows], torch.Tensor]) -> torch.Tensor:
        """Return (rows, width) of distinct rows of tokens; `encode` is given those that are not known."""
        keys = [np.array(row, dtype=np.int32).tobytes() for row in rows]
        with self._lock:
            slots = np.array([self._slots.get(key, -1) for key in keys], dtype=np.int64)
            known, missing = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
            for i in known:
                self._slots.move_to_end(keys[i])
            remembered = self._vectors[slots[known]]
        encoded = encode([rows[int(i)] for i in missing])
        found = torch.empty(len(rows), self._vectors.shape[1], device=self._vectors.device)
        found[known], found[missing] = remembered, encoded
        with self._lock:
            self._keep([keys[i] for i in missing], encoded)
        return found

    def clear(self) -> None:
        """Forget them all."""
        with self._lock:
            self._slots.clear()

    def _keep(self, keys: Sequence[bytes], vectors: torch.Tensor) -> None:
        places, slots = [], []
        for place in range(max(0, len(keys) - self.max_rows), len(keys)):
            if keys[place] in self._slots:  # another thread was faster
                continue
            full = len(self._slots) == self.max_rows
            slot = self._slots.popitem(last=False)[1] if full else len(self._slots)
            self._slots[keys[place]] = slot
            places.append(place)
            slots.append(slot)
        self._vectors[slots] = vectors[places]
