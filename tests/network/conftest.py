"""Hypothesis as this machine can bear it: no deadline beside other lanes, and the same examples every time."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("network", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("network")
