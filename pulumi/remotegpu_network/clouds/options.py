"""The options that every resource gets, by what desired.py says of it. A provider is always named: a forgotten one
would be the default provider, with whatever credentials lie about."""

from __future__ import annotations

import pulumi
from remotegpu_network.desired import Resource


def options(each: Resource, provider: pulumi.ProviderResource, *after: pulumi.Resource) -> pulumi.ResourceOptions:
    """`after`: what must exist first although no id is taken from it."""
    return pulumi.ResourceOptions(
        provider=provider,
        aliases=[pulumi.Alias(name=name) for name in each.aliases] or None,
        delete_before_replace=each.delete_first or None,
        protect=each.protect or None,
        import_=each.adopt,
        depends_on=list(after) or None,
    )
