"""What every process of the portal does first, whether it serves, works or runs one command."""

from __future__ import annotations

from portal.db import connect
from portal.integrations import queue
from portal.services import config, vault
from portal.settings import Settings


def bind(settings: Settings) -> None:
    """Bind the database, the settings, the vault and the queue of this process."""
    connect(settings.database_url)
    config.use(settings)
    vault.unlock(settings)
    queue.use(settings)
