"""A role's templates and variables as a host would see them, without a host.

`Role` holds one role for many questions, on top of tests/support/rendering.py, which reads its variables.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from tests.support import rendering
from tests.support.rendering import ROLES, variables_of

SUITES = {" ".join(distribution): suite for suite, distribution in rendering.DISTRIBUTIONS.items()}
DISTRIBUTIONS = tuple(SUITES)


class Role:
    """One role on one distribution; keyword arguments are what an inventory would say."""

    def __init__(self, name: str, distribution: str = "Debian 13", **said: Any) -> None:
        self.path = ROLES / name
        self._loader = DataLoader()
        self.variables = variables_of(name, SUITES[distribution], **{"ansible_managed": "managed", **said})

    def value(self, name: str, **more: Any) -> Any:
        """A variable, rendered."""
        return self._templar(more).template(self.variables[name])

    def expression(self, text: str, **more: Any) -> Any:
        return self._templar(more).template(trust_as_template(text))

    def template(self, name: str, **more: Any) -> str:
        """A template, rendered."""
        folder = str(self.path / "templates")  # where one template finds another
        text = self._loader.get_text_file_contents(f"{folder}/{name}")
        templar = self._templar(more).copy_with_new_env(searchpath=[folder])
        return str(templar.template(trust_as_template(text), overrides={"trim_blocks": True}))

    def lines(self, name: str, **more: Any) -> list[str]:
        """A template's lines without blanks and comments."""
        stripped = (line.strip() for line in self.template(name, **more).splitlines())
        return [line for line in stripped if line and not line.startswith("#")]

    def _templar(self, more: dict[str, Any]) -> Templar:
        return Templar(self._loader, variables={**self.variables, **more})


def load_module(role: str, name: str) -> ModuleType:
    """A module of the role's own library, as Python."""
    return load_file(ROLES / role / "library" / f"{name}.py", f"{role}_{name}")


def load_file(path: Path, name: str) -> ModuleType:
    """A program that no package holds, as Python under that name."""
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module
