"""Grants: what a lease opens, wanted and seen, one row for each thing."""

from __future__ import annotations

from typing import Any

import pytest

from portal.db import atomic, utcnow
from portal.models import Grant, Lease, Tenant
from portal.models.states import GRANTS_OF_EVERY_LEASE
from portal.services import grants
from tests.factories import make_machine


@pytest.fixture
def lease(database: Any, tenant: Tenant) -> Lease:
    machine = make_machine(state="leased")
    lease = Lease.create(machine=machine, tenant=tenant, state="active", starts_at=utcnow(), ends_at=utcnow())
    with atomic():
        grants.open_all(lease)
    return lease


def test_a_lease_opens_what_every_lease_does_and_nothing_is_known_of_it_yet(lease: Lease) -> None:
    rows = grants.of_lease(lease)
    assert [grant.kind for grant in rows] == list(GRANTS_OF_EVERY_LEASE)
    assert {(grant.desired, grant.observed, grant.observed_at) for grant in rows} == {("open", "unknown", None)}


def test_what_is_unknown_is_not_closed(lease: Lease) -> None:
    assert not grants.are_all_closed(lease)
    grants.observe(lease, "keys", "closed")
    assert not grants.are_all_closed(lease)
    grants.observe(lease, "tasks", "unknown")
    assert not grants.are_all_closed(lease)
    grants.observe(lease, "tasks", "closed")
    assert grants.are_all_closed(lease)


def test_wanting_all_closed_is_written_once(lease: Lease) -> None:
    grants.want_all_closed(lease)
    first = [grant.desired_at for grant in grants.of_lease(lease)]
    grants.want_all_closed(lease)
    assert [grant.desired_at for grant in grants.of_lease(lease)] == first
    assert {grant.desired for grant in grants.of_lease(lease)} == {"closed"}


def test_only_news_is_news(lease: Lease) -> None:
    assert grants.observe(lease, "keys", "open", fingerprints=["SHA256:a"])
    assert not grants.observe(lease, "keys", "open", fingerprints=["SHA256:a"])
    since = grants.get(lease, "keys").observed_at
    assert grants.observe(lease, "keys", "open", fingerprints=[])
    assert grants.get(lease, "keys").observed_at == since
    assert grants.observe(lease, "keys", "closed", fingerprints=[])
    assert grants.get(lease, "keys").observed_at > since
    assert Grant.select().where(Grant.observed == "closed").count() == 1
