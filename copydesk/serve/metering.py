"""What the service counts, for Prometheus.

Knows names and buckets; knows nothing of how a request or a page is handled.
"""

from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from copydesk.page import ModelInfo, Page

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS = (64, 256, 1_024, 2_048, 4_096, 8_192, 12_288, 16_384, 32_768, 65_536, 131_072)
_PAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Meters:
    """The counters of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        GCCollector(registry)
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "copydesk_requests", "Requests by route and status.", ["method", "route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "copydesk_request_seconds",
            "From a request's headers to the last byte of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.waiting = Gauge("copydesk_waiting_pages", "Pages accepted and not yet answered.", registry=registry)
        self.held = Gauge("copydesk_held_bytes", "Bytes of request bodies in memory.", registry=registry)
        self.pages = Counter("copydesk_pages", "Pages by what became of them.", ["outcome"], registry=registry)
        self.sections = Counter("copydesk_sections", "Sections of the pages read.", ["label"], registry=registry)
        self.batch_tokens = Histogram("copydesk_batch_tokens", "Tokens of a batch.", buckets=_TOKENS, registry=registry)
        self.batch_pages = Histogram("copydesk_batch_pages", "Pages of a batch.", buckets=_PAGES, registry=registry)
        self.batch_seconds = Histogram(
            "copydesk_batch_seconds", "The network's time for a batch.", buckets=_SECONDS, registry=registry
        )
        self.reloads = Counter("copydesk_model_reloads", "Reloads of the model.", ["outcome"], registry=registry)
        self._model = Info("copydesk_model", "The model that reads.", registry=registry)

    def name_model(self, model: ModelInfo) -> None:
        """Say which model reads from now on."""
        self._model.info(model.model_dump())

    def count_batch(self, *, pages: int, tokens: int, seconds: float) -> None:
        """Count a batch of the network."""
        self.batch_pages.observe(pages)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)

    def count_page(self, page: Page) -> None:
        """Count a page that was read, and its sections."""
        self.pages.labels("read").inc()
        for label, number in Tally(section.label for section in page.sections).items():
            self.sections.labels(label).inc(number)

    def exposition(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
