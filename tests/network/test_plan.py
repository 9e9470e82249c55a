"""The plan, the guard, and the step that goes first."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portal.api.network import OutputsIn
from remotegpu_network import __main__ as command
from remotegpu_network import desired, document, gate, guard, plan, steps
from remotegpu_network import stack as stack_program
from remotegpu_network.document import BadDocument, Document
from remotegpu_network.guard import Refused
from remotegpu_network.plan import What
from remotegpu_network.settings import Settings
from remotegpu_network.standing import At, Mark, judge, of_outputs
from tests.network.export import name, opening, parsed, resources, sealed, stack

ROOT = Path(__file__).parents[2]
ADDRESS = name("m1.address", "gpu-01", "A", "203.0.113.1")


def test_a_second_plan_has_nothing_to_do() -> None:
    rows = [
        ADDRESS,
        name("n", "@", "MX", {"priority": 1, "target": "m.example.org"}, in_zone="r53"),
        opening("o", "10.0.0.0/8"),
    ]
    made = plan.compare(resources(*rows), resources(*rows))
    assert made.changes == ()
    assert plan.summary(made) == "Nothing to do: 6 resources are as they should be."


def test_the_plan_says_what_happens_by_cloud_and_zone() -> None:
    before = resources(
        ADDRESS, name("n2", "old", "A", "203.0.113.2"), name("n3", "x", "A", "203.0.113.3", in_zone="r53")
    )
    after = resources(
        name("m1.address", "gpu-01", "CNAME", "edge.example.org"),
        name("n3", "x", "A", "203.0.113.3", in_zone="r53", ttl_s=60),
        name("n4", "new", "A", "203.0.113.4"),
    )
    assert plan.text(plan.compare(before, after)).splitlines() == [
        "aws  gpu.example.com",
        "  ~ n3  A x.gpu.example.com → 203.0.113.3  (change)",
        "      ttl: 300 → 60",
        "",
        "cloudflare  gpu.example.org",
        "  - n2  A old.gpu.example.org → 203.0.113.2  (delete)",
        "  ± m1.address  CNAME gpu-01.gpu.example.org → edge.example.org.  (replace, deleted first)",
        "      type: A → CNAME",
        "      content: 203.0.113.1 → edge.example.org",
        "  + n4  A new.gpu.example.org → 203.0.113.4  (create)",
        "",
        "1 to delete, 1 to replace, 1 to change, 1 to create; 0 stay as they are.",
    ]


def test_adding_and_removing_one_of_several_values_touches_no_other() -> None:
    one = [{"priority": p, "target": f"m{p}.example.org"} for p in (1, 2, 3)]
    before, after = resources(name("n", "@", "MX", *one)), resources(name("n", "@", "MX", one[0], one[2]))
    assert [c.what for c in plan.compare(before, after).changes] == [What.DELETE]
    assert [c.what for c in plan.compare(after, before).changes] == [What.CREATE]


# -- the guard


def fleet(machines: int, generation: int = 1) -> Document:
    rows = [name(f"m{i}.address", f"gpu-{i}", "A", "203.0.113.1") for i in range(machines)]
    return parsed(*rows, generation=generation, machines={f"m{i}": f"gpu-{i}" for i in range(max(machines, 1))})


@pytest.mark.parametrize(("now", "stopped"), [(100, False), (80, False), (79, True), (0, True)])
def test_an_export_that_lost_more_than_a_fifth_stops_with_an_explanation(now: int, stopped: bool) -> None:
    before = guard.of_document(fleet(100), stack())
    if not stopped:
        guard.check(fleet(now, 2), stack(), before)
        return
    with pytest.raises(Refused) as refused:
        guard.check(fleet(now, 2), stack(), before)
    told = str(refused.value)
    assert f"{100 - now} of 100 names are gone since the last apply" in told
    assert "pulumi config set remotegpu:max-loss-percent 100" in told
    assert told.endswith("Nothing was changed.")
    guard.check(fleet(now, 2), stack(max_loss_percent=100), before)


def test_swapping_half_of_the_fleet_for_others_is_a_loss_although_the_numbers_agree() -> None:
    swapped = parsed(*(name(f"x{i}", f"gpu-{i}", "A", "203.0.113.1") for i in range(100)))
    with pytest.raises(Refused, match="100 of 100 names"):
        guard.check(swapped, stack(), guard.of_document(fleet(100, 0), stack()))


def test_the_end_of_a_lease_in_a_small_fleet_is_no_fault() -> None:
    before = guard.of_document(fleet(4), stack())
    guard.check(fleet(2, 2), stack(), before)
    with pytest.raises(Refused):
        guard.check(fleet(2, 2), stack(may_lose=0), before)


def leased(*leases: str, generation: int = 1, ended: list[str] | None = None) -> Document:
    """Ten machines with a name each; a lease has two names and three openings more."""
    rows = [name(f"m{i}.address", f"gpu-{i}", "A", "203.0.113.1") for i in range(10)]
    for at, lease in enumerate(leases):
        rows += [name(f"{lease}.{slot}", f"{lease}-{slot}", "A", "203.0.113.1", lease=lease) for slot in ("a", "b")]
        rows += [opening(f"o{lease}.{i}", f"10.{at}.{i}.0/24", lease=lease) for i in range(3)]
    return parsed(*rows, generation=generation, **({} if ended is None else {"ended": ended}))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_leases_that_ended_are_no_loss_however_many_end_at_once(count: int) -> None:
    leases = ["l1", "l2", "l3", "l4"]
    before = guard.of_document(leased(*leases), stack())
    guard.check(leased(*leases[count:], generation=2, ended=leases[:count]), stack(may_lose=0), before)


def test_leases_that_an_older_database_never_heard_of_are_lost() -> None:
    before = guard.of_document(leased("l1", "l2", "l3", "l4"), stack())
    for ended in (None, [], ["l9"]):
        with pytest.raises(Refused, match="8 of 18 names") as refused:
            guard.check(leased(generation=2, ended=ended), stack(), before)
        assert "12 of 12 openings" in str(refused.value)


def test_what_else_is_gone_does_not_hide_behind_leases_that_ended() -> None:
    """Of the two leases that did not end, both are gone: that is all that there was besides."""
    before = guard.of_document(leased("l1", "l2", "l3", "l4"), stack())
    with pytest.raises(Refused, match="6 of 6 openings"):
        guard.check(leased(generation=2, ended=["l1", "l2"]), stack(max_loss_percent=60), before)


@given(
    st.lists(st.sampled_from(["l1", "l2", "l3", None]), max_size=12),
    st.sets(st.integers(0, 11)),
    st.sets(st.sampled_from(["l1", "l2", "l3"])),
)
def test_the_guard_says_what_it_would_say_if_ended_leases_had_never_been(
    owners: list[str | None], gone: set[int], ended: set[str]
) -> None:
    def export(kept: list[int], **fields: Any) -> Document:
        return parsed(*(name(f"n{i}", f"n{i}", "A", "203.0.113.1", lease=owners[i]) for i in kept), **fields)

    def told(before: list[int]) -> str:
        try:
            guard.check(after, stack(), guard.of_document(export(before), stack()))
        except Refused as error:
            return str(error)
        return ""

    everything = list(range(len(owners)))
    after = export(
        [i for i in everything if i not in gone and owners[i] not in ended], generation=8, ended=sorted(ended)
    )
    assert told(everything) == told([i for i in everything if owners[i] not in ended])


def test_an_empty_export_is_refused_even_the_first_time() -> None:
    empty = document.parse(sealed(machines={}))
    with pytest.raises(Refused, match="The export is empty"):
        guard.check(empty, stack(max_loss_percent=100), None)


ROUTE53 = stack(clouds=("aws",))


def two_clouds(cloudflare: int, route53: int, opened: int = 0, *, generation: int = 2) -> Document:
    return parsed(
        *(name(f"c{i}", f"c{i}", "A", "203.0.113.1") for i in range(cloudflare)),
        *(name(f"r{i}", f"r{i}", "A", "203.0.113.1", in_zone="r53") for i in range(route53)),
        *(opening(f"o{i}", f"10.0.{i}.0/24") for i in range(opened)),
        generation=generation,
    )


def known_by(form: str, before: Document, settings: Settings) -> guard.Baseline:
    """As the export itself, or as the outputs of an apply say it."""
    if form == "export":
        return guard.of_document(before, settings)
    told = stack_program.told_of(before, desired.resources(before, settings), settings)
    if form == "older outputs":
        del told["own"]
    return guard.baseline(json.dumps({"network": told, "groups": {}}), settings)


@pytest.mark.parametrize("form", ["export", "outputs", "older outputs"])
def test_a_small_stack_that_loses_all_is_stopped_however_large_another_cloud_is(form: str) -> None:
    before = known_by(form, two_clouds(1000, 20, generation=1), ROUTE53)
    with pytest.raises(Refused, match="20 of 20 names"):
        guard.check(two_clouds(1000, 0), ROUTE53, before)
    guard.check(two_clouds(1000, 16), ROUTE53, before)
    with pytest.raises(Refused, match="5 of 20 names"):
        guard.check(two_clouds(1000, 15), ROUTE53, before)


@pytest.mark.parametrize("form", ["export", "outputs", "older outputs"])
def test_what_another_cloud_loses_stops_its_own_stack_and_no_other(form: str) -> None:
    before = two_clouds(1000, 20, generation=1)
    guard.check(two_clouds(0, 20), ROUTE53, known_by(form, before, ROUTE53))
    for clouds in (("cloudflare",), ("cloudflare", "aws")):
        theirs = stack(clouds=clouds)
        with pytest.raises(Refused, match=r"1000 of 10[02]0 names"):
            guard.check(two_clouds(0, 20), theirs, known_by(form, before, theirs))


@pytest.mark.parametrize("form", ["export", "outputs"])
def test_names_and_openings_of_a_stack_are_counted_apart(form: str) -> None:
    before = known_by(form, two_clouds(0, 5, 50, generation=1), ROUTE53)
    with pytest.raises(Refused, match="5 of 5 names"):
        guard.check(two_clouds(0, 0, 50), ROUTE53, before)
    with pytest.raises(Refused, match="50 of 50 openings"):
        guard.check(two_clouds(0, 5, 0), ROUTE53, before)


@pytest.mark.parametrize("form", ["export", "outputs", "older outputs"])
def test_a_stack_that_had_nothing_and_has_nothing_goes_on(form: str) -> None:
    before = known_by(form, two_clouds(3, 0, generation=1), ROUTE53)
    guard.check(two_clouds(3, 0), ROUTE53, before)
    empty = document.parse(sealed(machines={}))
    guard.check(empty, ROUTE53, before)
    with pytest.raises(Refused, match="The export is empty"):
        guard.check(empty, stack(max_loss_percent=100), known_by(form, two_clouds(3, 0, generation=1), stack()))


def test_the_portal_takes_what_a_stack_says_that_it_applied() -> None:
    """It refuses fields that it does not know."""
    wanted = two_clouds(2, 3, 1)
    outputs = {"network": stack_program.told_of(wanted, desired.resources(wanted, ROUTE53), ROUTE53), "groups": {}}
    taken = OutputsIn().load(json.loads(json.dumps(outputs)))
    assert (taken["network"]["own"], taken["network"]["counts"]["names"]) == ({"names": 3, "openings": 1}, 5)


def test_a_stack_is_counted_for_itself_by_the_command_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = tmp_path / "Pulumi.prod.yaml"
    yaml.write_text("config:\n  remotegpu:environment: production\n  remotegpu:clouds: [aws]\n")
    files = {"a": two_clouds(100, 10, generation=1).raw, "b": two_clouds(100, 0).raw, "c": two_clouds(0, 10).raw}
    argv = ("--applied", "a.json", "--stack", str(yaml))
    status, _, err = run(tmp_path, capsys, "plan", "b.json", *argv, **files)
    assert (status, "10 of 10 names are gone" in err) == (1, True)
    assert run(tmp_path, capsys, "plan", "c.json", *argv)[0] == 0


def test_an_older_export_never_goes_back_behind_a_newer_one() -> None:
    with pytest.raises(Refused, match="generation 4, the last apply was of 5"):
        guard.check(fleet(3, 4), stack(), guard.of_document(fleet(3, 5), stack()))


def test_the_outputs_of_the_last_apply_serve_as_what_was_applied() -> None:
    outputs = {"network": {"generation": 3, "counts": {"machines": 100, "names": 100, "openings": 0}}, "groups": {}}
    before = guard.baseline(json.dumps(outputs), stack())
    guard.check(fleet(90, 4), stack(), before)
    with pytest.raises(Refused, match="50 of 100 names"):
        guard.check(fleet(50, 4), stack(), before)


@pytest.mark.parametrize("text", ["", "{}", '{"network": {}}', '{"network": {"own": []}}', "null", "[]"])
def test_what_is_no_baseline_is_not_taken_for_an_empty_one(text: str) -> None:
    with pytest.raises(BadDocument):
        guard.baseline(text, stack())


def test_a_missing_baseline_is_no_first_time(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"names applied\.json, which cannot be read"):
        guard.last_applied(stack(applied="applied.json"), tmp_path)
    assert guard.last_applied(stack(applied="first"), tmp_path) is None


# -- the gate, where it counts what the guard cannot see


def preview(**names: list[str]) -> dict[str, Any]:
    """Operation → type::name of each resource."""
    steps = [(op, each) for op, found in names.items() for each in found]
    return {"steps": [{"op": op, "urn": f"urn:pulumi:prod::remotegpu::{each}"} for op, each in steps]}


def urns(found: list[desired.Resource]) -> list[str]:
    return [f"{each.token}::{each.logical}" for each in found]


def test_a_cloud_that_would_go_whole_is_not_hidden_by_a_large_one_beside_it() -> None:
    wanted = two_clouds(1000, 4, 6)
    both, one = (
        desired.resources(wanted, stack(clouds=each)).resources for each in (("cloudflare", "aws"), ("cloudflare",))
    )
    gone = [each for each in both if each.cloud == "aws"]
    told = gate.problems(preview(delete=urns(gone)), stack(clouds=("cloudflare",)), wanted=one)
    assert len(told) == 1
    assert f"{len(gone)} of {len(gone)} resources in aws would be deleted, 100 %" in told[0]
    assert "remotegpu:clouds" in told[0]
    assert "pulumi config set remotegpu:max-loss-percent 100" in told[0]
    meant = stack(clouds=("cloudflare",), max_loss_percent=100)
    assert gate.problems(preview(delete=urns(gone)), meant, wanted=one) == []


@pytest.mark.parametrize(
    ("wanted", "made", "gone", "stopped"),
    [(16, 0, 4, False), (16, 0, 5, True), (20, 0, 3, False), (20, 18, 3, True), (20, 20, 2, False)],
)
def test_deletions_are_counted_of_what_was_there_and_what_is_only_made_was_not(
    wanted: int, made: int, gone: int, stopped: bool
) -> None:
    has = desired.resources(two_clouds(0, wanted), ROUTE53).resources
    old = [f"{desired.ROUTE53_RECORD}::old{i}" for i in range(gone)]
    told = gate.problems(preview(delete=old, create=urns(has[:made])), ROUTE53, wanted=has)
    assert bool(told) == stopped, told


def test_a_provider_that_goes_holds_nothing() -> None:
    gone = [f"pulumi:providers:aws::aws-{i}" for i in range(5)]
    assert gate.problems(preview(delete=gone), stack()) == []


@given(st.sets(st.sampled_from(["l1", "l2", "l3", "l4"])), st.sets(st.sampled_from(["l1", "l2", "l3", "l4"])))
def test_what_the_guard_lets_through_the_gate_lets_through(gone: set[str], ended: set[str]) -> None:
    every = ["l1", "l2", "l3", "l4"]
    before = leased(*every)
    after = leased(*(each for each in every if each not in gone), generation=2, ended=sorted(ended))
    try:
        guard.check(after, stack(), guard.of_document(before, stack()))
    except Refused:
        return
    had, has = (desired.resources(each, stack()).resources for each in (before, after))
    deleted = [each.resource for each in plan.compare(had, has).changes if each.what is What.DELETE]
    meant = {(each.token, each.logical) for each in deleted}
    assert gate.problems(preview(delete=urns(deleted)), stack(), wanted=has, meant=meant) == []


def test_the_command_lets_through_what_the_export_takes_away_and_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = leased("l1", "l2"), leased(generation=2, ended=["l1", "l2"])
    had, has = (desired.resources(each, stack()).resources for each in (before, after))
    ended = urns([change.resource for change in plan.compare(had, has).changes])
    (tmp_path / "Pulumi.prod.yaml").write_text(
        "config:\n  remotegpu:environment: production\n  remotegpu:clouds: [cloudflare, aws]\n"
    )
    argv = ("--applied", "a.json", "--applied", "first", "--stack", str(tmp_path / "Pulumi.prod.yaml"))
    files = {"a": before.raw, "b": after.raw, "p": preview(delete=ended)}
    assert run(tmp_path, capsys, "gate", "p.json", "b.json", *argv, **files)[0] == 0
    more = preview(delete=[*ended, *(f"{desired.CLOUDFLARE_RECORD}::old{i}" for i in range(3))])
    status, _, err = run(tmp_path, capsys, "gate", "p.json", "b.json", *argv, p=more)
    assert (status, "3 of 13 resources in cloudflare would be deleted" in err) == (1, True), err
    assert run(tmp_path, capsys, "gate", "p.json", "b.json", "--applied", "first", "--stack", argv[-1])[0] == 1


# -- where the stack stands


@pytest.mark.parametrize(
    ("own", "told", "at"),
    [
        (None, None, At.FIRST),
        ((7, "a"), (7, "a"), At.TOLD),
        ((7, "step"), (7, "a"), At.TOLD),
        ((7, None), (7, "a"), At.TOLD),
        ((9, "c"), (7, "a"), At.EXPORT),
        ((9, "c"), None, At.EXPORT),
        ((8, "b"), (7, "a"), At.OTHER),
        ((8, None), None, At.OTHER),
    ],
)
def test_a_stack_stands_where_its_own_outputs_say(
    own: tuple[int, str | None] | None, told: tuple[int, str] | None, at: At
) -> None:
    newest = Mark(9, "c")
    found = judge(own and Mark(*own), told and Mark(*told), newest, stack="prod", is_believed=False)
    assert found is at


@pytest.mark.parametrize("outputs", [[], {"groups": {}}, {"network": {}}, {"network": {"generation": "7"}}])
def test_outputs_of_another_program_are_no_word_of_what_was_applied(outputs: Any) -> None:
    if outputs == []:
        assert of_outputs({}) is None
        return
    with pytest.raises(BadDocument, match="another program's"):
        of_outputs(outputs)


# -- the step that goes first


class Zone:
    """A cloud that refuses what real ones refuse. An engine that works as Pulumi's does changes it."""

    def __init__(self) -> None:
        self.there: dict[str, desired.Resource] = {}
        self.dark: set[str] = set()

    def apply(self, wanted: Document) -> None:
        after = desired.resources(wanted, stack()).resources
        made = plan.compare(list(self.there.values()), after)
        for change in made.changes:
            if change.what is not What.DELETE:
                self.there.pop(change.resource.logical, None)  # one that is replaced is deleted first
                self._put(change.resource)
        for change in made.changes:
            if change.what is What.DELETE:
                del self.there[change.resource.logical]
        assert {each.logical for each in after} == set(self.there)

    def _put(self, new: desired.Resource) -> None:
        for other in self.there.values():
            mine, its = new.shape, other.shape
            if (new.place, mine.name) != (other.place, its.name):  # type: ignore[union-attr]
                continue
            kinds = {mine.type, its.type}  # type: ignore[union-attr]
            assert "CNAME" not in kinds, f"{new.label} beside {other.label}"
            assert new.label != other.label, f"{new.label} is there already"
            assert new.token != desired.ROUTE53_RECORD or len(kinds) == 2, f"{new.label} already exists"
        self.there[new.logical] = new


def apply_all(*exports: Document) -> list[Document]:
    cloud, done = Zone(), list[Document]()
    cloud.apply(exports[0])
    for before, after in pairwise(exports):
        at = before
        while (step := steps.first_step(at, after, stack())) is not None:
            cloud.apply(step)
            done.append(step)
            at = step
        cloud.apply(after)
        done.append(after)
    return done


def test_two_addresses_that_become_a_cname_take_two_applies_and_the_name_never_goes_dark() -> None:
    both = parsed(ADDRESS, name("m1.address6", "gpu-01", "AAAA", "2001:db8::1"))
    cname = parsed(name("m1.address", "gpu-01", "CNAME", "edge.example.org"), generation=8)
    first, second = apply_all(both, cname)
    assert (first.generation, second.generation) == (7, 8), "a stack that breaks between the two is at none of them"
    assert [(entry.key, entry.type) for entry in first.names] == [("m1.address", "A")]
    assert second.checksum == cname.checksum


def test_one_apply_is_enough_for_what_does_not_clash() -> None:
    cname = parsed(name("m1.address", "gpu-01", "CNAME", "edge.example.org"))
    assert len(apply_all(parsed(ADDRESS), cname)) == 1
    assert len(apply_all(cname, parsed(ADDRESS))) == 1
    assert len(apply_all(parsed(ADDRESS), parsed(ADDRESS, name("n", "x", "A", "203.0.113.9")))) == 1


@pytest.mark.parametrize("in_zone", ["cf", "r53"])
def test_two_machines_can_swap_their_names(in_zone: str) -> None:
    def pair(first: str, second: str, kind: str = "CNAME") -> Document:
        return parsed(
            name("m1.address", first, kind, "a.example.org", in_zone=in_zone),
            name("m2.address", second, kind, "b.example.org", in_zone=in_zone),
        )

    done = apply_all(pair("x", "y"), pair("y", "x"))
    assert [len(step.names) for step in done] == [1, 1, 2]  # one of them is gone for two applies: no other way


def test_the_principal_value_can_go_and_the_second_takes_its_place() -> None:
    done = apply_all(
        parsed(name("n", "x", "A", "203.0.113.1", "203.0.113.2")), parsed(name("n", "x", "A", "203.0.113.2"))
    )
    assert [step.names[0].values for step in done] == [("203.0.113.1",), ("203.0.113.2",)]


KEYS = st.lists(st.sampled_from(["k1", "k2", "k3", "k4"]), unique=True, max_size=4)


@st.composite
def small_zone(draw: st.DrawFn) -> Document:
    """Valid exports over three names, so that they get in each other's way."""
    rows, taken = list[dict[str, Any]](), dict[str, set[str]]()
    for key in draw(KEYS):
        at, kind = draw(st.sampled_from(["x", "y", "z"])), draw(st.sampled_from(["A", "AAAA", "CNAME"]))
        there = taken.setdefault(at, set())
        if kind in there or "CNAME" in there or (kind == "CNAME" and there):
            continue
        there.add(kind)
        pool = {
            "A": ["203.0.113.1", "203.0.113.2", "203.0.113.3"],
            "AAAA": ["2001:db8::1", "2001:db8::2"],
            "CNAME": ["t.example.org"],
        }
        values = draw(
            st.lists(st.sampled_from(pool[kind]), unique=True, min_size=1, max_size=1 if kind == "CNAME" else 3)
        )
        rows.append(name(key, at, kind, *values, in_zone=draw(st.just("cf"))))
    return parsed(*rows)


@given(small_zone(), small_zone())
def test_from_any_zone_to_any_other_in_few_applies_that_the_cloud_takes(before: Document, after: Document) -> None:
    done = apply_all(before, after)
    assert len(done) <= 5
    assert done[-1].checksum == after.checksum


# -- by the command


def run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, *argv: str, **files: Any
) -> tuple[int, str, str]:
    for file, content in files.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(content))
    argv = tuple(str(tmp_path / part) if part.endswith(".json") else part for part in argv)
    status = command.main([word, *argv])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_the_command_plans_checks_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a": sealed(ADDRESS), "b": sealed(ADDRESS, name("n", "x", "A", "203.0.113.9"), generation=8)}
    assert run(tmp_path, capsys, "check", "a.json", **files)[:2] == (
        0, "Generation 7 of production: 1 machines, 4 zones, 0 groups, 1 names, 0 openings; 1 resources.\n",
    )  # fmt: skip
    status, out, _ = run(tmp_path, capsys, "plan", "b.json", "--applied", "a.json")
    assert (status, out.splitlines()[-1]) == (0, "1 to create; 1 stay as they are.")
    status, out, err = run(tmp_path, capsys, "plan", "a.json", "--applied", "b.json")
    assert (status, "1 to delete" in out, "generation 7, the last apply was of 8" in err) == (1, True, True)
    status, out, _ = run(tmp_path, capsys, "plan", "a.json", "--as", "json")
    assert json.loads(out)["counts"] == {"delete": 0, "replace": 0, "change": 0, "create": 1, "adopt": 0}
    (tmp_path / "bad.json").write_text("{")
    assert run(tmp_path, capsys, "check", "bad.json")[0] == 1


def test_make_prints_the_plan_without_any_engine(tmp_path: Path) -> None:
    """Neither the CLI nor a library of the engine's or of a cloud's: all that it imports is in what it says."""
    for file, content in {
        "a": sealed(ADDRESS),
        "b": sealed(ADDRESS, name("n", "x", "A", "203.0.113.9"), generation=8),
    }.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(content))

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        environment = [
            "-o",
            ".venv/.runtime",
            f"BIN={Path(sys.executable).parent}",
        ]  # it installs nothing
        return subprocess.run(
            ["make", "network-plan", *environment, *words], cwd=ROOT, capture_output=True, text=True,
            env={"PATH": "/usr/bin:/bin", "PYTHONPROFILEIMPORTTIME": "1"},
        )  # fmt: skip

    done = make(f"EXPORT={tmp_path / 'b.json'}", f"APPLIED={tmp_path / 'a.json'}")
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["1 to create; 1 stay as they are."]), done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "remotegpu_network" in imported
    assert [each for each in imported if each.startswith(("pulumi", "grpc", "tencentcloud"))] == []
    assert "make network-plan EXPORT=export.json" in make().stderr


def test_the_command_writes_the_step_that_goes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "a": sealed(ADDRESS, name("m1.address6", "gpu-01", "AAAA", "2001:db8::1")),
        "b": sealed(name("m1.address", "gpu-01", "CNAME", "edge.example.org")),
    }
    assert run(tmp_path, capsys, "step", "b.json", "--applied", "a.json", "--out", "s.json", **files)[0] == 3
    assert run(tmp_path, capsys, "step", "b.json", "--applied", "s.json", "--out", "t.json")[0] == 0
    assert not (tmp_path / "t.json").exists()


def test_the_command_says_what_a_cancelled_run_left_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    urn = "urn:pulumi:prod::remotegpu::cloudflare:index/dnsRecord:DnsRecord::n1"
    open_ = {"deployment": {"pending_operations": [{"type": "creating", "resource": {"urn": urn}}]}}
    status, _, err = run(tmp_path, capsys, "pending", "a.json", a=open_)
    assert (status, f"creating of {urn} was cut off" in err) == (1, True)
    assert run(tmp_path, capsys, "pending", "b.json", b={"deployment": {}})[0] == 0
