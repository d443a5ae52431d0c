"""What bounds the service: sizes, numbers, times.

Knows defaults; imports nothing heavy, because `--help` reads it.
"""

from dataclasses import dataclass

MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Bounds of the service. Times are in seconds, sizes in bytes."""

    max_body: int = 20 * MEBIBYTE
    """Of a request, packed or unpacked; of one line of a stream."""
    max_page: int = 5 * MEBIBYTE
    """Of a page."""
    max_sections: int = 10_000
    """Of a page."""
    max_depth: int = 5_000
    """Of nested elements of a page: the parser's time grows with its square."""
    max_pages: int = 64
    """In a request; a stream may have any number."""
    max_waiting: int = 256
    """Pages accepted and not yet answered, of all requests together."""
    max_held: int = 512 * MEBIBYTE
    """Bytes of all request bodies together."""
    max_connections: int = 2_048
    """Open at once; a connection above gets 503."""
    batch_tokens: int = 16_384
    """Budget of one batch of the network; a page above it makes a batch of its own."""
    lanes: int = 2
    """Batches that are read at once; they share the processor's threads."""
    stream_window: int = 32
    """Pages of one stream that wait at once: beyond them its lines are not read."""
    timeout: float = 60
    """From the last byte of a request to its answer."""
    read_timeout: float = 30
    """For a request's headers, for its body, and for the next line of a stream."""
    grace: float = 30
    """After SIGTERM, to finish what was accepted."""
    watch: float = 30
    """Between two looks at a registry alias; 0 looks never."""

    def __post_init__(self) -> None:
        """Check what hangs together.

        Raises:
            ValueError: a request or stream could never find room.
        """
        for name in ("max_pages", "stream_window"):
            if getattr(self, name) > self.max_waiting:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, max_waiting {self.max_waiting}: raise max_waiting to at least "
                    f"{getattr(self, name)}, or lower {name}"
                )
