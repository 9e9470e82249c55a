"""A role's templates and variables as a host would see them, without a host.

`Role` loads a role as Ansible does: defaults, vars/main.yml, the narrowest file of the distribution, then what the test
says.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

ROLES = Path(__file__).parents[2] / "roles"
DISTRIBUTIONS = ("Debian 12", "Debian 13", "Ubuntu 22", "Ubuntu 24")


class Role:
    """One role on one distribution; keyword arguments are what an inventory would say."""

    def __init__(self, name: str, distribution: str = "Debian 13", **said: Any) -> None:
        self.path = ROLES / name
        self._loader = DataLoader()
        family, major = distribution.split()
        candidates = [f"{family}_{major}.yml", f"{family}.yml", "Debian.yml"]
        chosen = next(file for file in candidates if (self.path / "vars" / file).exists())
        self.variables: dict[str, Any] = {"ansible_managed": "managed", "role_path": str(self.path)}
        for file in ("defaults/main.yml", "vars/main.yml", f"vars/{chosen}"):
            self.variables |= self._loader.load_from_file(str(self.path / file), trusted_as_template=True)
        self.variables |= said

    def value(self, name: str, **more: Any) -> Any:
        """A variable, rendered."""
        return self._templar(more).template(self.variables[name])

    def expression(self, text: str, **more: Any) -> Any:
        return self._templar(more).template(trust_as_template(text))

    def template(self, name: str, **more: Any) -> str:
        """A template, rendered."""
        text = self._loader.get_text_file_contents(str(self.path / "templates" / name))
        overrides = {"trim_blocks": True}
        return str(self._templar(more).copy_with_new_env().template(trust_as_template(text), overrides=overrides))

    def lines(self, name: str, **more: Any) -> list[str]:
        """A template's lines without blanks and comments."""
        stripped = (line.strip() for line in self.template(name, **more).splitlines())
        return [line for line in stripped if line and not line.startswith("#")]

    def _templar(self, more: dict[str, Any]) -> Templar:
        return Templar(self._loader, variables={**self.variables, **more})


def load_module(role: str, name: str) -> ModuleType:
    """A module of the role's own library, as Python."""
    path = ROLES / role / "library" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"{role}_{name}", path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module
