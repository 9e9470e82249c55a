"""One cleaning step: look, act, look again.

The result comes from the last look alone. A step never reports its own return code: an act may fail half-way or claim
success, and only what is still there counts. What could not be looked at is unknown, and unknown is not clean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.evidence import REASON_CHARS, Told
from remotegpu_agent.observe.tools import printable
from remotegpu_agent.progress import tick


class NotApplicable(Exception):
    """This host has nothing of the kind that the step looks at; the message says why."""


@dataclass(frozen=True)
class Finding:
    """One thing that must not be there: `subject` for the act (a path, pid or id), `text` for people."""

    subject: Any
    text: str


Look = Callable[[Scope], Iterable[Finding]]
Act = Callable[[Scope, Any], Iterable[str]]  # a list of findings, or the look itself where the step streams


@dataclass(frozen=True)
class Step:
    """What to look for, and how to be rid of it.

    `acts_anyway`: also where the look before it found nothing. `streams`: the act takes the findings while the look
    goes on, for there may be a million of them.
    """

    id: str
    look: Look
    act: Act
    acts_anyway: bool = False
    streams: bool = False

    def first_look(self, scope: Scope) -> Any:
        """What is there before anything is touched, as evidence; None where it cannot be seen yet."""
        try:
            return evidence(self.look(scope))
        except Exception:  # the second look decides, and will say why
            return None

    def run(self, scope: Scope, before: Any) -> dict[str, Any]:
        """Act and look again; the step as the protocol reports it. Never raises."""
        began = time.monotonic()
        tick()
        step = {"id": self.id, "result": "unknown", "reason": None, "before": before, "acted": self._act(scope)}
        try:
            left = evidence(self.look(scope))
            step |= {"result": "failed", "reason": reason(left)} if left["count"] else {"result": "passed"}
            step["after"] = left
        except NotApplicable as why:
            step |= {"result": "not_applicable", "reason": str(why), "after": None}
        except Exception as error:  # whatever went wrong: the host is not proven clean, and the next step still runs
            step |= {"reason": printable(f"could not look: {_in_words(error)}")[:REASON_CHARS], "after": None}
        return step | {"duration_s": round(time.monotonic() - began, 3)}

    def _act(self, scope: Scope) -> list[str]:
        """What was done about what is there now, up to the first error: it is told, and the second look judges."""
        done, stopped = Told(), None
        try:
            for line in self._lines(scope):
                done.add(line)
        except NotApplicable:
            pass
        except Exception as error:
            stopped = f"stopped by {_in_words(error)}"
        return done.with_rest(last=stopped)

    def _lines(self, scope: Scope) -> Iterable[str]:
        if self.streams:
            return self.act(scope, self.look(scope))
        found = list(self.look(scope))
        return self.act(scope, found) if found or self.acts_anyway else ()


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def evidence(found: Iterable[Finding]) -> dict[str, Any]:
    """The findings as JSON: how many, and each in words, as far as there is room. The rest is counted and forgotten."""
    told = Told()
    for each in found:
        tick()
        told.add(each.text)
    return {"count": told.count, "found": told.lines}


def reason(seen: dict[str, Any]) -> str:
    """What `evidence` answered, in one sentence."""
    text = "; ".join(seen["found"])
    if len(text) <= REASON_CHARS and seen["count"] == len(seen["found"]):
        return text
    return f"{text[: REASON_CHARS - 20]} … ({seen['count']} in all)"
