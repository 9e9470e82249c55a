"""What every adapter asks of a resource alike: its options, and the id of what it lies in. A provider is always named:
a forgotten one would be the default provider, with whatever credentials lie about."""

from __future__ import annotations

from collections.abc import Mapping

import pulumi
from remotegpu_network.desired import Resource


def options(each: Resource, provider: pulumi.ProviderResource) -> pulumi.ResourceOptions:
    return pulumi.ResourceOptions(
        provider=provider,
        aliases=[pulumi.Alias(name=name) for name in each.aliases] or None,
        delete_before_replace=each.delete_first or None,
        protect=each.protect or None,
        import_=each.adopt,
    )


def parent_id(each: Resource, made: Mapping[str, pulumi.CustomResource]) -> pulumi.Input[str]:
    """Of its zone or group: of the one that this stack has made, else the one that is known."""
    return made[each.within].id if each.within else each.parent or ""
