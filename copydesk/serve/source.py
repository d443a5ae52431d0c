"""Where the service's model comes from, and whether another one stands there now.

Knows folders and registry addresses; knows nothing of requests.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path

from copydesk.predictor import Device, Precision, Predictor, load
from copydesk.registry import SCHEME, fetch, version_of
from copydesk.serve.desk import Desk
from copydesk.split import Limits

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ModelSource:
    """A model folder, or the address of one in a registry."""

    address: str
    """A path, or `models:/NAME@ALIAS`."""
    device: Device = "auto"
    precision: Precision = "auto"
    limits: Limits = field(default_factory=Limits)

    @property
    def is_watched(self) -> bool:
        """Whether another model may come to stand there by a registry's decision."""
        return self.address.startswith(SCHEME) and "@" in self.address

    def version(self) -> str:
        """Return the version that the registry has there.

        Raises:
            RegistryError: it cannot be told.
        """
        return version_of(self.address)

    def load(self) -> Predictor:
        """Load the model that stands there now.

        Raises:
            ValueError: there is none, or it cannot be trusted, understood or placed on the device.
        """
        folder = fetch(self.address) if self.address.startswith(SCHEME) else Path(self.address)
        return load(folder, device=self.device, precision=self.precision, limits=self.limits)


async def reload(desk: Desk, source: ModelSource) -> bool:
    """Load the model again, beside the one that reads meanwhile, and change over.

    Returns:
        Whether that worked; if not, the old one stays.
    """
    before = desk.predictor.info
    try:
        predictor = await asyncio.to_thread(source.load)
    except (ValueError, OSError):
        log.exception("the model could not be loaded again: %s %s stays", before.name, before.version)
        desk.meters.reloads.labels("failed").inc()
        return False
    desk.use(predictor)
    desk.meters.reloads.labels("done").inc()
    log.info("%s %s follows %s %s", predictor.info.name, predictor.info.version, before.name, before.version)
    return True


async def watch(desk: Desk, source: ModelSource, *, every: float, version: str) -> None:
    """Reload whenever the registry's alias moves. Runs until it is cancelled.

    Args:
        desk: that uses the model.
        source: whose address has an alias.
        every: seconds between two looks.
        version: that was loaded.
    """
    reachable = True
    while True:
        await asyncio.sleep(every)
        try:
            found = await asyncio.to_thread(source.version)
        except (ValueError, OSError) as error:
            if reachable:  # once, not every few seconds while the registry is away
                log.warning("the registry cannot be asked, the model stays: %s", error)
            reachable = False
            continue
        reachable = True
        if found != version:
            log.info("%s moved from version %s to %s", source.address, version, found)
            if await reload(desk, source):
                version = found
