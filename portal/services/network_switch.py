"""One switch for each lease: its openings, forward and names open together with its keys, and close together.

`grants.py` has the rows; here they are kept in step with what the lease opens in the network: `follow` after every
change of what is wanted, `refresh` after every word of an agent or a stack. A lease has only the grants of what it
opens. Everything here happens inside the transaction that holds the machine's row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from portal.db import utcnow
from portal.models import Forward, Grant, Lease, Machine, Opening, SecurityGroup
from portal.models.states import GRANTS_BY_AGENTS, GRANTS_BY_STACKS
from portal.services import (
    grants,
    network,
    network_applied,
    network_export,
    network_forwards,
    network_names,
    network_openings,
    network_quota,
    network_zones,
)
from portal.services.actors import Actor
from portal.services.network_applied import View
from portal.services.network_names import Row
from portal.services.network_openings import Wish

KINDS = (*GRANTS_BY_AGENTS, *GRANTS_BY_STACKS)
Wanted = Mapping[str, frozenset[str]]  # cloud → words of rows


# Open, move, close


def open_all(lease: Lease, machine: Machine, wishes: Sequence[Wish], *, by: Actor) -> None:
    """With the lease's keys: what was asked for, what the lease that it continues had, and the way in by a gateway."""
    before = lease.continues if lease.continues_id is not None else None
    for wished in wishes:
        network_openings.add(machine, wished, by=by, lease=lease)
    if before is not None:
        network_openings.carry_over(before, lease, machine, by=by)
        network_names.carry_over(before, lease)
    opened = network_openings.wanted_of(machine, lease)
    network_forwards.follow(lease, machine, opened, by=by, before=before)
    if opened:  # one that opens nothing begins also behind a group that is full
        network_quota.refuse_unfit(machine)
    if _by_stacks(lease):
        network.changed()
    follow(lease)


def moved(lease: Lease) -> None:
    """It has a later end: the agents are told, and a group's opening says so to people."""
    network_forwards.moved(lease)
    if grants.find(lease, "security_group") is not None:
        network.changed()


def close_all(lease: Lease, *, by: Actor) -> None:
    """With the lease's keys. Its row must not be active any more."""
    now = utcnow()
    network_openings.close_all(lease, now, by=by)
    network_forwards.close_all(lease, now, by=by)
    network_names.close_all(lease, by=by)
    is_known = any(grants.find(lease, kind) is not None for kind in GRANTS_BY_STACKS)
    if is_known or network_names.find_zone(of="leases") is not None:
        network.changed()
    follow(lease)


def _by_stacks(lease: Lease) -> bool:
    return any(wanted_in_clouds(lease, kind) for kind in GRANTS_BY_STACKS)


# What is wanted


def wanted_in_clouds(lease: Lease, kind: str) -> Wanted:
    """What stands under this lease in the next export, by cloud: a word for each row, as for what was applied."""
    if lease.state != "active":
        return {}
    if kind == "name":
        zones = {zone.key: zone.cloud for zone in network_zones.list_zones()}
        return _by_cloud((zones[row["zone"]], row) for row in network_names.of_lease_wanted(lease))
    machine = lease.machine
    if machine.security_group_id is None:
        return {}
    cloud = SecurityGroup.get_by_id(machine.security_group_id).cloud
    opened = network_openings.wanted_of(machine, lease)
    return _by_cloud((cloud, network_export.row_of_opening(opening, machine)) for opening in opened)


def _by_cloud(pairs: Iterable[tuple[str, Row]]) -> Wanted:
    found: dict[str, set[str]] = {}
    for cloud, row in pairs:
        found.setdefault(cloud, set()).add(network_applied.word_of(row))
    return {cloud: frozenset(words) for cloud, words in found.items()}


def _parts_wanted(lease: Lease, kind: str) -> list[str]:
    """What of this kind is wanted, each by a word that is its own."""
    if kind == "firewall":
        return [each.key for each in network_openings.wanted_of(lease.machine, lease)]
    if kind == "forward":
        return [f"f{each.id}" for each in network_forwards.of_lease(lease) if each.closed_at is None]
    return sorted(word for words in wanted_in_clouds(lease, kind).values() for word in words)


def follow(lease: Lease, *, since: int | None = None) -> None:
    """Bring the grants into step with what the lease wants now, and look at once what was seen of it.

    `since`: the first generation that may have had what is new; by default this one.
    """
    generation = network.state().generation
    since = generation if since is None else since
    for kind in KINDS:
        parts, grant = _parts_wanted(lease, kind), grants.find(lease, kind)
        if grant is None and not parts:
            continue
        desired = "open" if parts else "closed"
        if grant is None:
            grants.open_one(lease, kind, generation=generation, parts=parts, since=since)
        elif (grant.desired, grant.detail.get("parts")) != (desired, parts):
            grants.want(grant, desired, generation=generation, parts=parts)
    refresh(lease)


# What was seen


def refresh(lease: Lease, views: Mapping[str, View] | None = None) -> bool:
    """Compare what is wanted with what agents and stacks said last; True when that is news."""
    news = False
    for grant in grants.of_lease(lease):
        if grant.kind == "firewall":
            holes: Sequence[Opening | Forward] = network_openings.of_lease(lease)
            news |= _note(grant, _of_holes(holes), holes=[_told(each) for each in holes])
        elif grant.kind == "forward":
            holes = network_forwards.of_lease(lease)
            news |= _note(grant, _of_holes(holes), holes=[_told(each) for each in holes])
        elif grant.kind in GRANTS_BY_STACKS:
            views = network_applied.views() if views is None else views
            state, found = _of_stacks(lease, grant, views)
            news |= _note(grant, state, **found)
    return news


def _note(grant: Grant, observed: str, **found: Any) -> bool:
    """What belongs to the wish stays in the detail; what was found is written over."""
    kept = {name: grant.detail[name] for name in ("parts", "since") if name in grant.detail}
    return grants.note(grant, observed, **kept, **found)


def _of_holes(holes: Sequence[Opening | Forward]) -> str:
    """Closed is all closed. Open is each one as it is wanted, what is wanted no longer closed; or, where nothing is
    wanted, anything open still.
    """
    if all(each.observed == "closed" for each in holes):
        return "closed"
    if any(each.closed_at is None for each in holes):
        is_open = all(each.observed == ("open" if each.closed_at is None else "closed") for each in holes)
    else:
        is_open = any(each.observed == "open" for each in holes)
    return "open" if is_open else "unknown"


def _told(hole: Opening | Forward) -> dict[str, Any]:
    return {"id": hole.id, "wanted": hole.closed_at is None, "observed": hole.observed, "error": hole.error}


def _of_stacks(lease: Lease, grant: Grant, views: Mapping[str, View]) -> tuple[str, dict[str, Any]]:
    """By the documents that the stacks applied last. Nothing was ever given out: nothing can be there."""
    key, wanted = network_names.key_of_lease(lease), wanted_in_clouds(lease, grant.kind)
    clouds = sorted(set(wanted) | set(grant.detail.get("clouds", ())))
    missing, left = list[str](), list[str]()  # what is there and shall be another is both
    states = set()
    for cloud in clouds:
        there = _there(cloud, grant.kind, key, views)
        here = wanted.get(cloud, frozenset())
        lacking, more = here - (there or frozenset()), (there or frozenset()) - here
        missing += sorted(map(network_applied.key_in, lacking))
        left += sorted(map(network_applied.key_in, more))
        if there is None:
            states.add("unknown")
        elif grant.desired == "open":
            states.add("open" if not lacking and not more else "unknown" if there else "closed")
        elif there:
            states.add("open")
        else:
            states.add("closed" if _is_settled(grant, views.get(cloud)) else "unknown")
    return _sum(states), {"clouds": clouds, "missing": missing, "left": left}


def _there(cloud: str, kind: str, key: str, views: Mapping[str, View]) -> frozenset[str] | None:
    view = views.get(cloud)
    return frozenset() if view is None else view.words_of(kind, key)


def made(lease: Lease, kind: str) -> frozenset[str]:
    """The words of what the stacks have applied for it."""
    key, views = network_names.key_of_lease(lease), network_applied.views()
    return frozenset[str]().union(*(_there(cloud, kind, key, views) or () for cloud in views))


def _is_settled(grant: Grant, view: View | None) -> bool:
    """No apply that is still under way can bring it back: a stack is past the wish, or gone, or nobody was given it."""
    wished = grant.generation or 0
    if view is not None and (view.is_gone or view.generation >= wished):
        return True
    return not network_export.was_given_out(since=grant.detail.get("since", 0), before=wished)


def _sum(states: set[str]) -> str:
    if not states or states == {"closed"}:
        return "closed"
    return "open" if "open" in states and "unknown" not in states and "closed" not in states else "unknown"


def leases_to_refresh(views: Mapping[str, View]) -> list[Lease]:
    """Those of which these views may say something new: what they want is not what was seen, or is there no more.

    One query, whatever the number of leases: those that are as they shall be cost nothing at each apply.
    """
    rows = (
        Grant.select(
            Grant.id,
            Grant.lease,
            Grant.kind,
            Grant.desired,
            Grant.observed,
            Grant.detail,
            Lease.id,
            Lease.login,
            Machine.id,
        )
        .join(Lease)
        .join(Machine)
        .where(Grant.kind << GRANTS_BY_STACKS, Grant.written_off_at.is_null())
        .where((Grant.desired == "open") | (Grant.observed != "closed"))
        .order_by(Grant.lease)
    )
    waiting = (grant for grant in rows if grant.observed != grant.desired or not _is_there(grant, views))
    return list({grant.lease_id: grant.lease for grant in waiting}.values())


def _is_there(grant: Grant, views: Mapping[str, View]) -> bool:
    key = network_names.key_of_lease(grant.lease)
    found: set[str] = set()
    for cloud in grant.detail.get("clouds", ()):
        found |= _there(cloud, grant.kind, key, views) or frozenset()
    return found.issuperset(grant.detail.get("parts", ()))


def leases_to_follow() -> list[Lease]:
    """Active ones whose names shall be others than their grants say: an address was edited, or the zone of leases.

    A few queries, whatever the number of leases.
    """
    of_leases = (row for row in network_export.names_wanted() if row["lease"] is not None)
    wanted = defaultdict[str, list[str]](list)
    for row in network_names.zones().fitting(of_leases):
        wanted[row["lease"]].append(network_applied.word_of(row))
    active = Lease.select(Lease, Machine).join(Machine).where(Lease.state == "active").order_by(Lease.id)
    told = Grant.select(Grant.lease, Grant.detail).join(Lease).where(Grant.kind == "name", Lease.state == "active")
    known = {grant.lease_id: grant.detail.get("parts", []) for grant in told}
    return [lease for lease in active if known.get(lease.id, []) != sorted(wanted[network_names.key_of_lease(lease)])]


def write_off(lease: Lease, kind: str) -> None:
    """Nobody waits for it any more: what it held is given back."""
    if kind == "forward":
        network_forwards.release(lease)
