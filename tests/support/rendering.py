"""What a role would write on a distribution that no test host runs: its templates rendered by Ansible's own engine.

The values are the role's own: defaults, vars, what it loads for the distribution, then what the test gives. Nothing is
executed and nothing is reached; what the file does on a host is the scenario's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import filter_loader, init_plugin_loader
from ansible.template import Templar, trust_as_template

ROLES = Path(__file__).parents[2] / "roles"

DISTRIBUTIONS = {
    "bookworm": ("Debian", "12"),
    "trixie": ("Debian", "13"),
    "jammy": ("Ubuntu", "22"),
    "noble": ("Ubuntu", "24"),
}
FACTS = {
    "os_family": "Debian",
    "service_mgr": "systemd",
    "memtotal_mb": 16_000,
    "processor_vcpus": 8,
    "hostname": "control",
    "fqdn": "control.example.org",
    "default_ipv4": {"address": "192.0.2.10"},
}


def variables_of(role: str, suite: str, **given: Any) -> dict[str, Any]:
    """The variables of `role` on that suite: defaults, vars/main.yml, the distribution's file, then `given`."""
    distribution, major = DISTRIBUTIONS[suite]
    files = [ROLES / role / "defaults" / "main.yml", ROLES / role / "vars" / "main.yml", _narrowest(role, suite)]
    loader = DataLoader()
    variables: dict[str, Any] = {}
    for file in files:
        if file is not None and file.exists():
            variables |= loader.load_from_file(str(file), trusted_as_template=True) or {}
    facts = {**FACTS, "distribution": distribution, "distribution_major_version": major}
    return {
        "ansible_facts": facts,
        "ansible_check_mode": False,
        "inventory_hostname": "control",
        "role_path": str(ROLES / role),
        **variables,
        **given,
    }


def render(role: str, template: str, suite: str, **given: Any) -> str:
    """`templates/TEMPLATE` of the role as the module `template` would write it there."""
    path = ROLES / role / "templates" / template
    text = evaluate("{{ lookup('ansible.builtin.template', __path) }}", role, suite, __path=str(path), **given)
    return str(text)


def evaluate(expression: str, role: str, suite: str, **given: Any) -> Any:
    """What an expression of the role's tasks comes to on that suite."""
    _know_plugins()
    loader = DataLoader()
    loader.set_basedir(str(ROLES / role))
    return Templar(loader, variables=variables_of(role, suite, **given)).template(trust_as_template(expression))


def argument_specs(role: str) -> Mapping[str, Any]:
    specs = yaml.safe_load((ROLES / role / "meta" / "argument_specs.yml").read_text())
    return dict(specs["argument_specs"]["main"]["options"])


def _narrowest(role: str, suite: str) -> Path | None:
    """The file that tasks/vars.yml would load: from narrow to broad, the first is taken."""
    distribution, major = DISTRIBUTIONS[suite]
    names = (f"{distribution}_{major}", distribution, "Debian")
    found = (ROLES / role / "vars" / f"{name}.yml" for name in names)
    return next((path for path in found if path.exists()), None)


@cache
def _know_plugins() -> None:
    """Once a process: lookups and filters are found by name only after this."""
    init_plugin_loader()
    for folder in sorted(ROLES.glob("*/filter_plugins")):
        filter_loader.add_directory(str(folder))
