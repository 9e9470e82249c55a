"""What a cloud takes of one security group, counted before an opening is wanted. The stacks' own code counts it."""

from __future__ import annotations

from portal.db import utcnow
from portal.errors import Conflict
from portal.models import Machine, SecurityGroup
from portal.services import network, network_export, network_openings, network_trial


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
    limits = network_openings.limits()
    quotas = {f"{cloud}_rules_per_group": getattr(limits, name) for cloud, name in network_openings.QUOTAS.items()}
    group_row = network_export.row_of_group(group)
    if problems := network_trial.problems(groups=[group_row], openings=rows, **quotas):
        raise Conflict(f"The security group {group.name} cannot take it: {' '.join(problems)}", code="group_full")
