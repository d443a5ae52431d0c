"""The process: sockets, signals and the end of service.

Knows uvicorn, signals and exit statuses; knows nothing of what is served.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from copydesk.serve.app import create_app
from copydesk.serve.desk import Desk
from copydesk.serve.gate import JsonLines
from copydesk.serve.problems import Refused, problem_response, unavailable
from copydesk.serve.settings import Settings
from copydesk.serve.source import ModelSource, reload, watch

log = logging.getLogger(__name__)

_SETTLE = 0.25
"""Seconds between the last accepted connection and the end of idle ones: what is on its way over them arrives."""
_KEEP_ALIVE = 15


def serve(
    source: ModelSource,
    settings: Settings,
    *,
    host: str,
    port: int,
    keys: Sequence[str] = (),
    log_level: str = "info",
) -> int:
    """Serve until a signal ends it.

    SIGTERM and SIGINT: accept nothing new, finish what was accepted; a second one ends at once. SIGHUP: load the model
    again.

    Returns:
        Exit status: 0 all that was accepted was answered, 1 not within the grace time.

    Raises:
        ValueError: the model cannot be loaded.
        OSError: the address cannot be listened on.
    """
    with _bound(host, port) as listening:
        _log_as_json(log_level)
        version = source.version() if source.is_watched else ""
        desk = Desk(source.load(), settings)
        config = uvicorn.Config(
            create_app(desk, keys=keys),
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(settings.grace)),
        )
        Protocol.header_timeout, Protocol.max_connections = settings.read_timeout, settings.max_connections
        server = Server(config, desk, source, version=version)
        server.run(sockets=[listening])
    logging.shutdown()
    status = 1 if server.lost else 0
    if server.lost or desk.batcher.is_computing:
        sys.stderr.flush()
        os._exit(status)  # the interpreter would wait for threads whose pages nobody waits for
    return status


def _bound(host: str, port: int) -> socket.socket:
    """Take an address, before the model is loaded; nobody can connect yet."""
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        if listening:
            listening.close()
        raise OSError(
            f"the service cannot listen on port {port} of {host} ({error.strerror}): give a free port with --port, 0 "
            "takes one, and an address of this machine with --host"
        ) from error
    return listening


class Protocol(H11Protocol):
    """HTTP/1.1 that waits forever neither for headers nor for a body nobody reads, and refuses as the service does."""

    header_timeout: float = 30
    max_connections: int = 2_048

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait; whatever comes over a connection too many is refused."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            refused = unavailable(
                f"more than {self.max_connections:,} connections are open: come again a little later",
                what="connections",
                got=len(self.connections),
                limit=self.max_connections,
                retry_after=1,
            )
            refused.headers["connection"] = "close"
            self.app = problem_response(refused, request_id=None)
        self._slow = self.loop.call_later(self.header_timeout, self._give_up)

    def handle_events(self) -> None:
        """Wait anew where the headers of another request have begun."""
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the rest of a body that was refused: a connection closed before takes the answer along."""
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        headers_begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        body_left = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if not (headers_begun or body_left):
            self._slow.cancel()
        elif self._slow.cancelled():
            self._slow = self.loop.call_later(self.header_timeout, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._slow.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        refused = Refused(400, f"the request is no HTTP/1.1: {msg}", headers={"connection": "close"})
        answer = problem_response(refused, request_id=None)
        start = h11.Response(status_code=400, headers=answer.raw_headers, reason=HTTPStatus.BAD_REQUEST.phrase)
        for event in (start, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _give_up(self) -> None:
        self.transport.close()


class Server(uvicorn.Server):
    """Uvicorn with our signals: it ends with status 0, and loses nothing that was accepted."""

    def __init__(self, config: uvicorn.Config, desk: Desk, source: ModelSource, *, version: str) -> None:
        super().__init__(config)
        self.desk, self.source, self.version = desk, source, version
        self.lost = 0
        """Requests that were accepted and not answered."""
        self._jobs: set[asyncio.Task[Any]] = set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals on the event loop, and do not raise them again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        yield

    def _end(self) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    def _reload(self) -> None:
        self._start(reload(self.desk, self.source))

    def _start(self, job: Any) -> None:
        task = asyncio.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and watch the registry."""
        await super().startup(sockets)
        every = self.desk.settings.watch
        if self.source.is_watched and every:
            self._start(watch(self.desk, self.source, every=every, version=self.version))
        model = self.desk.predictor.info
        for listening in self.servers[0].sockets:
            address, port = listening.getsockname()[:2]
            facts = {"host": address, "port": port, "model": model.name, "version": model.version}
            log.info("ready", extra={"facts": facts})

    async def shutdown(self, sockets: Any = None) -> None:
        """Stop accepting, answer what was accepted, and end."""
        log.info("ending", extra={"facts": {"waiting_pages": self.desk.batcher.num_waiting}})
        self.desk.closing.set()
        await asyncio.sleep(0)  # connections that the kernel completed are accepted in this pass
        for server in self.servers:
            server.close()
        await asyncio.sleep(_SETTLE)
        for job in self._jobs:
            job.cancel()
        deadline = asyncio.get_running_loop().time() + self.desk.settings.grace
        while self.server_state.tasks and not self.force_exit and asyncio.get_running_loop().time() < deadline:
            for connection in list(self.server_state.connections):
                connection.shutdown()
            await asyncio.sleep(0.02)
        self.lost = len(self.server_state.tasks)
        self.config.timeout_graceful_shutdown = 1
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()
        log.info("ended", extra={"facts": {"lost_requests": self.lost}})


def _log_as_json(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").setLevel("WARNING")
