"""The step `etc`: the rest of /etc, our own settings, and whom the host trusts.

An older baseline has no section of some of it: it tells nothing of them, and nothing is done. How a file is put back is
in `restored.py`, which certificates are a tenant's in `observe/authorities.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from remotegpu_agent import baseline
from remotegpu_agent.cleaning import restored
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.cleaning.step import Finding
from remotegpu_agent.observe import authorities
from remotegpu_agent.observe.files import Snapshot
from remotegpu_agent.observe.tools import run

_REBUILD = ""  # in a finding's place for a path and what was there: the distribution's own tool makes it anew


def look_for_settings(scope: Scope) -> Iterator[Finding]:
    """What differs in /etc, in our own settings, and among the authorities."""
    yield from restored.look_for_changes("etc")(scope)
    yield from _own_settings(scope)
    yield from _authorities(scope)


def _own_settings(scope: Scope) -> Iterator[Finding]:
    if os.path.lexists(baseline.ENROLL_TOKEN):
        yield Finding((baseline.ENROLL_TOKEN, None), f"{baseline.ENROLL_TOKEN} would enrol the agent anew")
    before = baseline.own_settings_of(scope.sections)
    if before is None:
        return
    now = baseline.read_own_settings()
    for path in sorted({*before, *now}):
        yield from restored.difference(path, before, now)


def _authorities(scope: Scope) -> Iterator[Finding]:
    """Files that somebody has put there, and certificates, whichever file holds them."""
    known = scope.sections.get("authorities")
    if known is None:
        return
    before: Snapshot = scope.sections["authority_files"]
    now = authorities.read_files()
    for path in authorities.to_compare(before, now):
        yield from restored.difference(path, before, now)
    found = authorities.look_at()
    for path, certificates in authorities.strange(known, found, authorities.offered).items():
        subject = _REBUILD if path == authorities.BUNDLE else (path, None)
        yield Finding(subject, authorities.in_words(path, "trusts", certificates))
    for path, certificates in authorities.missing(known, found, authorities.selected).items():
        yield Finding(_REBUILD, authorities.in_words(path, "lacks", certificates))


def put_back_settings(scope: Scope, found: list[Finding]) -> Iterator[str]:
    """Put the files back; then let what is made of them be made anew, where it is not as it should be.

    Not always: the list that an upgrade has made is right, and its selection has just been put back.
    """
    of_files = [each for each in found if each.subject != _REBUILD]
    yield from restored.put_back(scope, of_files)
    if any(authorities.is_told_of(each.subject[0]) for each in of_files) or any(_authorities(scope)):
        run(["update-ca-certificates", "--fresh"], timeout_s=120)
        yield "rebuilt the list of authorities"
