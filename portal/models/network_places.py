"""Where in the clouds names and openings are written down: zones and security groups. Machines stand in one."""

from __future__ import annotations

import peewee as pw

from portal.db import utcnow
from portal.models.base import Table, UtcDateTimeField, one_of
from portal.models.people import User
from portal.models.states import DNS_CLOUDS, GROUP_CLOUDS


class DnsZone(Table):
    """One zone at one provider. At most one holds the machines' own names, and at most one those of leases."""

    name = pw.CharField(253)  # A-labels
    cloud = pw.CharField(16, constraints=[one_of("cloud", DNS_CLOUDS)])
    external_id = pw.CharField(64, null=True)  # the provider's id; NULL where it goes by name, or the stack makes it
    serves_machines = pw.BooleanField(default=False)
    serves_leases = pw.BooleanField(default=False)
    ttl_s = pw.IntegerField(null=True)  # of those names; NULL: what the provider does by itself
    created_at = UtcDateTimeField(default=utcnow)
    created_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    created_by_id: int | None

    class Meta:
        indexes = ((("cloud", "name"), True),)

    @property
    def key(self) -> str:
        return f"z{self.id}"


DnsZone.add_index(DnsZone.serves_machines, unique=True, where=DnsZone.serves_machines, name="one_zone_of_machines")
DnsZone.add_index(DnsZone.serves_leases, unique=True, where=DnsZone.serves_leases, name="one_zone_of_leases")


class SecurityGroup(Table):
    """A group in a cloud, in front of machines. With an `external_id` it was there before: only its rules are ours."""

    name = pw.CharField(200)
    cloud = pw.CharField(16, constraints=[one_of("cloud", GROUP_CLOUDS)])
    region = pw.CharField(40)
    vpc = pw.CharField(64, null=True)
    external_id = pw.CharField(64, null=True)
    created_at = UtcDateTimeField(default=utcnow)
    created_by = pw.ForeignKeyField(User, null=True, on_delete="RESTRICT")
    created_by_id: int | None

    class Meta:
        indexes = ((("cloud", "region", "name"), True),)

    @property
    def key(self) -> str:
        return f"g{self.id}"
