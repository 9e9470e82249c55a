"""`python -m remotegpu_network WORD …`: what CI and people need of the export, without any engine.

    check EXPORT                              is it whole and meaningful
    plan EXPORT --applied FILE                what an apply would do
    step EXPORT --applied FILE --out FILE     writes the export that must go first, if one apply cannot do it
    adopt EXPORT LISTING --zone ID            which records Cloudflare has already, as lines for the stack file
    gate PREVIEW                              may this `pulumi preview --json` be applied
    pending STATE                             what a cancelled run left open in this `pulumi stack export`

Each takes --stack FILE, a Pulumi.<stack>.yaml; without it, every cloud is looked at and limits are as by default.
Exit status: 0 fine, 1 refused (the reason is on stderr), 2 wrong usage, 3 a step was written.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from remotegpu_network import adopt, desired, document, gate, guard, plan, settings, steps
from remotegpu_network.document import Document
from remotegpu_network.settings import CLOUDS, FIRST, Settings

WROTE_A_STEP = 3


def main(argv: list[str]) -> int:
    told = _arguments().parse_args(argv)
    gc.disable()  # a short life without rings of references; the collector would walk a million rows again and again
    try:
        status: int = told.run(told)
    except (document.BadDocument, guard.Refused, settings.BadSettings, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        gc.enable()
    return status


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m remotegpu_network", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = parser.add_subparsers(required=True, metavar="WORD")

    def word(name: str, run: Callable[[argparse.Namespace], int], *files: str) -> argparse.ArgumentParser:
        added = words.add_parser(name)
        added.set_defaults(run=run)
        for file in files:
            added.add_argument(file, type=Path)
        added.add_argument("--stack", type=Path, help="Pulumi.<stack>.yaml; without it every cloud is looked at")
        return added

    word("check", _check, "export")
    planned = word("plan", _plan, "export")
    planned.add_argument("--applied", default=FIRST, help="the export that was applied last, or first")
    planned.add_argument("--as", dest="form", choices=("text", "markdown", "json"), default="text")
    step = word("step", _step, "export")
    step.add_argument("--applied", type=Path, required=True)
    step.add_argument("--out", type=Path, required=True)
    adopted = word("adopt", _adopt, "export", "listing")
    adopted.add_argument("--zone", required=True, help="Cloudflare's id of the zone")
    word("gate", _gate, "preview")
    word("pending", _pending, "state")
    return parser


def _settings(told: argparse.Namespace, wanted: Document | None) -> Settings:
    if told.stack is not None:
        return settings.from_stack_file(told.stack)
    return Settings(environment=wanted.environment if wanted else "", clouds=CLOUDS)


def _check(told: argparse.Namespace) -> int:
    wanted = document.read(told.export.read_bytes())
    found = desired.resources(wanted, _settings(told, wanted))
    made = len(found.resources)
    print(f"Generation {wanted.generation} of {wanted.environment}: {_told(wanted.counts)}; {made} resources.")
    return 0


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _plan(told: argparse.Namespace) -> int:
    wanted = document.read(told.export.read_bytes())
    chosen = _settings(told, wanted)
    before = None if told.applied == FIRST else document.read(Path(told.applied).read_bytes())
    after = desired.resources(wanted, chosen)
    old = desired.resources(before, replace(chosen, environment=before.environment)).resources if before else []
    made = plan.compare(old, after.resources)
    if told.form == "json":
        print(json.dumps(plan.as_json(made), indent=1))
    elif told.form == "markdown":
        print(plan.markdown(made, f"Network of {wanted.environment}, generation {wanted.generation}"))
    else:
        print(plan.text(made))
    for note in (*after.notes, *_left_out(after.left_out)):
        print(f"note: {note}", file=sys.stderr)
    if before is not None and steps.first_step(before, wanted, chosen) is not None:
        print("note: this takes two applies, since a name is taken over by another record: see `step`", file=sys.stderr)
    guard.check(wanted, chosen, guard.of_document(before) if before else None)
    return 0


def _left_out(left: Mapping[str, int]) -> list[str]:
    return [f"{count} entries of {cloud} are left to other stacks" for cloud, count in sorted(left.items())]


def _step(told: argparse.Namespace) -> int:
    wanted = document.read(told.export.read_bytes())
    before = document.read(told.applied.read_bytes())
    step = steps.first_step(before, wanted, _settings(told, wanted))
    if step is None:
        return 0
    told.out.write_text(json.dumps(step.raw, ensure_ascii=False))
    print(f"{told.out} must be applied before {told.export}", file=sys.stderr)
    return WROTE_A_STEP


def _adopt(told: argparse.Namespace) -> int:
    wanted = document.read(told.export.read_bytes())
    rows = adopt.rows_of(_json(told.listing))
    found = adopt.cloudflare_listing(desired.resources(wanted, _settings(told, wanted)).resources, rows, told.zone)
    if found.adopt:
        print("config:\n  remotegpu:adopt:")
    for logical, record in sorted(found.adopt.items()):
        print(f"    {logical}: {record}")
    for sentence in (*found.changed, *found.unread, *found.taken):
        print(sentence, file=sys.stderr)
    return 1 if found.taken else 0


def _gate(told: argparse.Namespace) -> int:
    return _refuse(gate.problems(_json(told.preview), _settings(told, None)))


def _pending(told: argparse.Namespace) -> int:
    return _refuse(gate.pending(_json(told.state)))


def _refuse(problems: list[str]) -> int:
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise document.BadDocument([f"{file} is no JSON: {error}"]) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
