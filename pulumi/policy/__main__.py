"""The policy pack: `pulumi preview --policy-pack policy`. Its rules are functions in remotegpu_network/policy.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pulumi_policy import (
    EnforcementLevel,
    PolicyPack,
    ReportViolation,
    ResourceValidationArgs,
    ResourceValidationPolicy,
    StackValidationArgs,
    StackValidationPolicy,
)

import pulumi

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from remotegpu_network import policy, settings


def resource_policy(check: policy.Check) -> Any:
    """One policy a check: a violation names it."""

    def validate(args: ResourceValidationArgs, report_violation: ReportViolation) -> None:
        for problem in check(args.resource_type, args.props):
            report_violation(problem)

    title = (check.__doc__ or check.__name__.replace("_", " ")).splitlines()[0]
    return ResourceValidationPolicy(name=check.__name__.replace("_", "-"), description=title, validate=validate)


def _stack(args: StackValidationArgs, report_violation: ReportViolation) -> None:
    """By the stack's own settings: the engine gives its configuration to the pack, as to the program."""
    try:
        told = settings.read(pulumi.Config(settings.PROJECT).get)
    except settings.BadSettings as error:
        report_violation(str(error))
        return
    rows = ((each.resource_type, each.name, each.props) for each in args.resources)
    for problem in policy.stack_problems(rows, told):
        report_violation(problem)


def policies() -> list[Any]:
    """Every check of remotegpu_network/policy.py, and the one over the whole stack."""
    whole = StackValidationPolicy(name="stack", description=policy.stack_problems.__doc__ or "", validate=_stack)
    return [*map(resource_policy, policy.CHECKS), whole]


if __name__ == "__main__":
    PolicyPack(name="remotegpu-network", enforcement_level=EnforcementLevel.MANDATORY, policies=policies())
