"""One cleaning step: look, act, look again.

The result comes from the second look alone. A step never reports its own return code: an act may fail half-way or claim
success, and only what is still there counts. What could not be looked at is unknown, and unknown is not clean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.observe.tools import printable

_EVIDENCE_LINES, _EVIDENCE_CHARS, _REASON_CHARS = 500, 1000, 2000


class NotApplicable(Exception):
    """This host has nothing of the kind that the step looks at; the message says why."""


@dataclass(frozen=True)
class Finding:
    """One thing that must not be there: `subject` for the act (a path, pid or id), `text` for people."""

    subject: Any
    text: str

    def __str__(self) -> str:
        return printable(self.text)


Look = Callable[[Scope], Iterable[Finding]]
Act = Callable[[Scope, list[Finding]], Iterable[str]]


@dataclass(frozen=True)
class Step:
    """What to look for, and how to be rid of it."""

    id: str
    look: Look
    act: Act

    def run(self, scope: Scope) -> dict[str, Any]:
        """The step as the protocol reports it; never raises."""
        began = time.monotonic()
        step: dict[str, Any] = {"id": self.id, "result": "unknown", "reason": None, "before": None, "acted": []}
        step["after"] = None
        try:
            found = list(self.look(scope))
            step["before"] = evidence(found)
            step["acted"] = _acted(self.act, scope, found) if found else []
            left = list(self.look(scope))
            step["after"] = evidence(left)
            step["result"] = "failed" if left else "passed"
            step["reason"] = reason(left) if left else None
        except NotApplicable as why:
            step.update(result="not_applicable", reason=str(why))
        except Exception as error:  # whatever went wrong: the host is not proven clean, and the next step still runs
            step["reason"] = printable(f"could not look: {type(error).__name__}: {error}")[:_REASON_CHARS]
        step["duration_s"] = round(time.monotonic() - began, 3)
        return step


def _acted(act: Act, scope: Scope, found: list[Finding]) -> list[str]:
    """What was done, up to the first error: it is told, and the second look judges."""
    done: list[str] = []
    try:
        done.extend(printable(line)[:_EVIDENCE_CHARS] for line in act(scope, found))
    except Exception as error:
        done.append(printable(f"stopped by {type(error).__name__}: {error}")[:_EVIDENCE_CHARS])
    return done[:_EVIDENCE_LINES]


def evidence(found: list[Finding]) -> dict[str, Any]:
    """The findings as JSON: how many, and each in words, as far as there is room."""
    return {"count": len(found), "found": [str(each)[:_EVIDENCE_CHARS] for each in found[:_EVIDENCE_LINES]]}


def reason(found: list[Finding]) -> str:
    """The findings in one sentence."""
    text = "; ".join(str(each) for each in found)
    return text if len(text) <= _REASON_CHARS else f"{text[: _REASON_CHARS - 20]} … ({len(found)} in all)"
