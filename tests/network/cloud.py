"""A cloud in memory that refuses what the real ones refuse, and replaces what their providers replace.

Inputs are named as the engine names them. What it cannot know (defaults that a provider fills in, what an API answers
in another form) is listed as unverified in docs/network.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from remotegpu_network import desired

# As we know it of the providers: a change of these is another resource.
FORCES_NEW: Mapping[str, frozenset[str]] = {
    desired.CLOUDFLARE_ZONE: frozenset({"account", "name"}),
    desired.CLOUDFLARE_RECORD: frozenset({"zoneId", "type"}),
    desired.ROUTE53_ZONE: frozenset({"name"}),
    desired.ROUTE53_RECORD: frozenset({"zoneId", "name"}),
    desired.ALIDNS_DOMAIN: frozenset({"domainName"}),
    desired.ALIDNS_RECORD: frozenset({"domainName"}),
    desired.DNSPOD_DOMAIN: frozenset({"domain"}),
    desired.DNSPOD_RECORD: frozenset({"domain"}),
    desired.AWS_GROUP: frozenset({"name", "namePrefix", "description", "vpcId"}),
    desired.AWS_INGRESS: frozenset({"securityGroupId"}),
    desired.AWS_EGRESS: frozenset({"securityGroupId"}),
    desired.ALICLOUD_GROUP: frozenset({"vpcId"}),
    desired.ALICLOUD_RULE: frozenset(
        {"securityGroupId", "type", "ipProtocol", "portRange", "nicType", "policy", "priority", "cidrIp", "ipv6CidrIp"}
        | {"sourceSecurityGroupId"}
    ),
    desired.TENCENT_GROUP: frozenset(),
    desired.TENCENT_RULES: frozenset({"securityGroupId"}),
}
NAME_OF = {
    desired.CLOUDFLARE_RECORD: ("zoneId", "name", "type"),
    desired.ROUTE53_RECORD: ("zoneId", "name", "type"),
    desired.ALIDNS_RECORD: ("domainName", "rr", "type"),
    desired.DNSPOD_RECORD: ("domain", "subDomain", "recordType"),
}
RULES = (desired.AWS_INGRESS, desired.AWS_EGRESS, desired.ALICLOUD_RULE)
EXCLUSIVE = ("A", "AAAA", "CNAME")


class CloudError(Exception):
    """The API refuses."""


@dataclass
class Cloud:
    """`things`: id → type and inputs. `calls`: what was done, in order."""

    things: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    made: int = 0

    def create(self, kind: str, inputs: dict[str, Any]) -> str:
        """The id of what was made. Raises CloudError."""
        self._refuse(kind, inputs, but="")
        self.made += 1
        new = f"id-{self.made}"
        self.things[new] = (kind, inputs)
        self._note("create", new)
        return new

    def update(self, id_: str, inputs: dict[str, Any]) -> None:
        """Raises CloudError."""
        kind, _ = self._get(id_)
        self._refuse(kind, inputs, but=id_)
        self.things[id_] = (kind, inputs)
        self._note("update", id_)

    def delete(self, id_: str) -> None:
        """Raises CloudError."""
        self._get(id_)
        self._note("delete", id_)
        del self.things[id_]

    def read(self, id_: str) -> tuple[str, dict[str, Any]]:
        """By the id that is imported: Cloudflare's has the zone before it. Raises CloudError."""
        return self._get(id_.rpartition("/")[2])

    def replaces(self, kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        return any(old.get(key) != new.get(key) for key in FORCES_NEW.get(kind, ()))

    def _get(self, id_: str) -> tuple[str, dict[str, Any]]:
        if id_ not in self.things:
            raise CloudError(f"{id_} does not exist")
        return self.things[id_]

    def _note(self, verb: str, id_: str) -> None:
        kind, inputs = self.things[id_]
        name = [str(inputs.get(key)) for key in NAME_OF.get(kind, ())[1:]]
        self.calls.append(" ".join([verb, kind.rpartition(":")[2], *name]))

    def _refuse(self, kind: str, inputs: Mapping[str, Any], but: str) -> None:
        for other in self._others(kind, but):
            if kind in NAME_OF:
                _refuse_record(kind, inputs, other)
            elif kind in RULES and _peers(inputs) == _peers(other):
                raise CloudError("InvalidPermission.Duplicate: the rule exists already")

    def _others(self, kind: str, but: str) -> Iterator[Mapping[str, Any]]:
        return (inputs for id_, (other, inputs) in self.things.items() if other == kind and id_ != but)


def _refuse_record(kind: str, mine: Mapping[str, Any], its: Mapping[str, Any]) -> None:
    zone, name, type_ = NAME_OF[kind]
    if (mine[zone], mine[name]) != (its[zone], its[name]):
        return
    types = {mine[type_], its[type_]}
    if "CNAME" in types:
        raise CloudError(f"81053: an A, AAAA or CNAME record with that host already exists ({mine[name]})")
    if len(types) == 1 and (kind == desired.ROUTE53_RECORD or _content(mine) == _content(its)):
        raise CloudError(f"81058: an identical record already exists ({mine[name]} {mine[type_]})")


def _content(inputs: Mapping[str, Any]) -> Any:
    return (
        inputs.get("content") or inputs.get("data") or (inputs.get("value"), inputs.get("priority"), inputs.get("mx"))
    )


def _peers(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key not in ("description", "tags")}
