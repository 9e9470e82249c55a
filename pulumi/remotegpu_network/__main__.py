"""`python -m remotegpu_network WORD …`: what CI and people need of the export, without any engine.

    check EXPORT                              is it whole and meaningful
    plan EXPORT --applied FILE                what an apply would do
    step EXPORT --applied FILE --out FILE     writes the export that must go first, if one apply cannot do it
    adopt EXPORT LISTING --zone ID            which records Cloudflare has already, as lines for the stack file
    standing OUTPUTS EXPORT --told FILE …     which document the stack has applied last: prints first, told, export, or
                                              other with its checksum
    gate PREVIEW EXPORT --applied FILE …      may this `pulumi preview --json` be applied
    pending STATE                             what a cancelled run left open in this `pulumi stack export`
    comment EXPORT --name STACK …             the comment on a change, in Markdown, also where it is refused
    failed EXPORT --name STACK …              writes what the portal is told of an apply that failed, prints the query

Each takes --stack FILE, a Pulumi.<stack>.yaml; without it, every cloud is looked at and limits are as by default.
Exit status: 0 fine, 1 refused (the reason is on stderr), 2 wrong usage, 3 a step was written.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from remotegpu_network import adopt, comment, desired, document, gate, guard, plan, settings, standing, steps
from remotegpu_network.desired import Resource
from remotegpu_network.document import Document
from remotegpu_network.plan import Plan, What
from remotegpu_network.settings import CLOUDS, FIRST, Settings

WROTE_A_STEP = 3
LONGEST_REASON = 1000  # characters that the portal takes


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
    planned.add_argument("--as", dest="form", choices=("text", "json"), default="text")
    step = word("step", _step, "export")
    step.add_argument("--applied", type=Path, required=True)
    step.add_argument("--out", type=Path, required=True)
    adopted = word("adopt", _adopt, "export", "listing")
    adopted.add_argument("--zone", required=True, help="Cloudflare's id of the zone")
    stood = word("standing", _standing, "outputs", "export")
    stood.add_argument("--name", required=True, help="the stack's")
    stood.add_argument("--told", default=FIRST, help="what it has applied last by the portal's word, or first")
    stood.add_argument("--believed", default="", help="the stack whose state is right although the portal knows more")
    gated = word("gate", _gate, "preview", "export")
    gated.add_argument("--applied", action="append", default=[], help="what was applied before, each once, or first")
    word("pending", _pending, "state")
    commented = word("comment", _comment, "export")
    commented.add_argument("--name", required=True, help="the stack's")
    commented.add_argument("--applied", default=FIRST, help="the export that was applied last, or first")
    commented.add_argument(
        "--preview", type=Path, required=True, help="what `pulumi preview --json` printed, if it did"
    )
    commented.add_argument("--refused", type=_text, default="", help="why it would not be applied")
    failed = word("failed", _failed, "export")
    failed.add_argument("--name", required=True, help="the stack's")
    failed.add_argument("--reason", type=_text, required=True)
    failed.add_argument("--out", type=Path, required=True)
    return parser


def _text(given: str) -> str:
    """What was cut within a letter is no text otherwise."""
    return given.encode(errors="replace").decode()


def _settings(told: argparse.Namespace, wanted: Document | None) -> Settings:
    if told.stack is not None:
        return settings.from_stack_file(told.stack)
    return Settings(environment=wanted.environment if wanted else "", clouds=CLOUDS)


def _check(told: argparse.Namespace) -> int:
    wanted = document.read(told.export.read_bytes())
    found = desired.resources(wanted, _settings(told, wanted))
    made = len(found.resources)
    print(f"Generation {wanted.generation} of {wanted.environment}: {_told(wanted.counts)}; {made} resources.")
    _note(found.notes)
    return 0


def _note(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _plan(told: argparse.Namespace) -> int:
    wanted, before, chosen = _compared(told)
    after = desired.resources(wanted, chosen)
    made = plan.compare(_resources_of(before, chosen), after.resources)
    print(json.dumps(plan.as_json(made), indent=1) if told.form == "json" else plan.text(made))
    _note([*after.notes, *_left_out(after.left_out)])
    if before is not None and steps.first_step(before, wanted, chosen) is not None:
        _note(["this takes two applies, since a name is taken over by another record: see `step`"])
    guard.check(wanted, chosen, guard.of_document(before, chosen) if before else None)
    return 0


def _compared(told: argparse.Namespace) -> tuple[Document, Document | None, Settings]:
    wanted = document.read(told.export.read_bytes())
    before = None if told.applied == FIRST else document.read(Path(told.applied).read_bytes())
    return wanted, before, _settings(told, wanted)


def _resources_of(before: Document | None, chosen: Settings) -> Sequence[Resource]:
    if before is None:
        return []
    return desired.resources(before, replace(chosen, environment=before.environment)).resources


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


def _standing(told: argparse.Namespace) -> int:
    own = standing.of_outputs(_json(told.outputs))
    at = standing.judge(
        own,
        None if told.told == FIRST else standing.of_document(_json(Path(told.told))),
        standing.of_document(_json(told.export)),
        stack=told.name,
        is_believed=told.believed == told.name,
    )
    print(at.value, own.checksum or "" if own is not None and at is standing.At.OTHER else "")
    return 0


def _gate(told: argparse.Namespace) -> int:
    wanted = document.read(told.export.read_bytes())
    chosen = _settings(told, wanted)
    after = desired.resources(wanted, chosen).resources
    meant = set[tuple[str, str]]()
    for text in {Path(file).read_bytes() for file in told.applied if file != FIRST}:
        made = plan.compare(_resources_of(document.read(text), chosen), after)
        meant |= {(each.resource.token, each.resource.logical) for each in made.changes if each.what is What.DELETE}
    return _refuse(gate.problems(_json(told.preview), chosen, wanted=after, meant=meant))


def _pending(told: argparse.Namespace) -> int:
    return _refuse(gate.pending(_json(told.state)))


def _comment(told: argparse.Namespace) -> int:
    try:
        preview = json.loads(told.preview.read_bytes())
    except (OSError, ValueError):  # the engine did not come to it, or not to its end
        preview = None
    print(comment.markdown(told.name, refused=told.refused, preview=preview, planned=_planned(told)), end="")
    return 0


def _planned(told: argparse.Namespace) -> tuple[str, Plan] | None:
    """Title and plan; None where the export is why it was refused."""
    try:
        wanted, before, chosen = _compared(told)
        made = plan.compare(_resources_of(before, chosen), desired.resources(wanted, chosen).resources)
    except (document.BadDocument, settings.BadSettings, OSError):
        return None
    return f"{wanted.environment}, generation {wanted.generation}", made


def _failed(told: argparse.Namespace) -> int:
    try:
        wanted = document.read(told.export.read_bytes())
        outputs = {"network": {"environment": wanted.environment, "generation": wanted.generation}}
    except (document.BadDocument, OSError):  # it failed before there was one, or because of it
        outputs = {}
    told.out.write_text(json.dumps(outputs))
    print(urlencode({"stack": told.name, "outcome": "failed", "reason": told.reason[:LONGEST_REASON]}))
    return 0


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
