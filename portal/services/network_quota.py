"""What a cloud takes of one security group, counted before an opening is wanted. The stacks' own code counts it."""

from __future__ import annotations

from portal.db import utcnow
from portal.errors import Conflict
from portal.integrations.network_format import desired, document, settings
from portal.models import Machine, SecurityGroup
from portal.services import network, network_export, network_openings


def refuse_unfit(machine: Machine) -> None:
    """One rule too many would stop the whole stack, not only itself. Called inside the transaction that has added it.

    Raises Conflict with the stacks' own words.
    """
    if machine.security_group_id is None:
        return
    network.hold()
    group = SecurityGroup.get_by_id(machine.security_group_id)
    rows = list(network_export.openings_behind(group, utcnow()))
    if not rows:
        return
    body = {
        "environment": "trial", "generation": 0, "generated_at": "2000-01-01T00:00:00Z", "zones": [], "names": [],
        "machines": [{"key": key, "name": key} for key in sorted({row["machine"] for row in rows})],
        "groups": [network_export.row_of_group(group)], "openings": rows,
    }  # fmt: skip
    quota = network_openings.limits().rules_a_group
    stack = settings.Settings(environment="trial", clouds=(group.cloud,), aws_rules_per_group=quota)
    try:
        desired.resources(document.parse(document.seal(body)), stack)
    except document.BadDocument as error:
        raise Conflict(
            f"The security group {group.name} cannot take it: {' '.join(error.problems)}", code="group_full"
        ) from None
