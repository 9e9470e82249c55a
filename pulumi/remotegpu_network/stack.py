"""One run of a stack: read, check, guard, declare, and say what was applied. What `__main__.py` calls."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pulumi
from remotegpu_network import clouds, desired, document, guard, settings
from remotegpu_network.desired import Desired
from remotegpu_network.document import Document


def run(folder: Path) -> None:
    """Declare everything that the export wants of this stack. `folder` is where files of the settings are looked for.

    Raises pulumi.RunError with sentences for people; nothing is declared then.
    """
    try:
        told = settings.read(pulumi.Config(settings.PROJECT).get)
        wanted = document.read(_export(folder / told.export))
        guard.check(wanted, told, guard.last_applied(told, folder))
        found = desired.resources(wanted, told)
    except (settings.BadSettings, document.BadDocument, guard.Refused) as error:
        raise pulumi.RunError(str(error)) from None
    for note in found.notes:
        pulumi.warn(note)
    made = clouds.declare(found.resources)
    pulumi.export("network", told_of(wanted, found, told))
    pulumi.export("groups", {name: each.id for name, each in made.items()})


def _export(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise guard.Refused(f"The export {file} cannot be read ({error.strerror}). Nothing was changed.") from None


def told_of(wanted: Document, found: Desired, told: settings.Settings) -> dict[str, Any]:
    """What was applied, in numbers: CI posts it to the portal, and the next run's guard reads it.

    `clouds` says of which part of the export that is true: the portal opens and closes leases' grants by it. `counts`
    are of the whole export, `own` of that part.
    """
    return {
        "clouds": sorted(told.clouds),
        "environment": wanted.environment,
        "generation": wanted.generation,
        "checksum": wanted.checksum,
        "counts": wanted.counts,
        "own": guard.own_counts(wanted, told),
        "resources": dict(Counter(f"{each.cloud} {each.place}" for each in found.resources)),
        "left_out": dict(found.left_out),
    }
