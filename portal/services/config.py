"""The settings of this process, for the rules that depend on one: limits of health, quotas, where the signing key lies.

Every process that calls services says `config.use(settings)` once, at start. A rule that can take a value as an
argument takes it as an argument.
"""

from __future__ import annotations

from portal.settings import Settings

_settings: Settings | None = None


def use(settings: Settings) -> None:
    global _settings
    _settings = settings


def current() -> Settings:
    """Raises RuntimeError in a process that never said which settings it runs with."""
    if _settings is None:
        raise RuntimeError("config.use(settings) was not called in this process")
    return _settings
