"""What a cleaning step may say, whom an order may touch, and which table of steps and checks there is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent import baseline, cleaning, verify
from remotegpu_agent.cleaning import data, kernel, network, processes, remove, restored, scope, settings
from remotegpu_agent.cleaning.scope import Refused, Scope
from remotegpu_agent.cleaning.step import Finding, NotApplicable, Step, evidence
from remotegpu_agent.observe import accounts, files, firewall, modules, mounts, packages, ports, special
from remotegpu_agent.portal import LARGEST_MESSAGE_BYTES
from tests.support.dirt import WAYS

PASSWD = {"root": ["root:x:0:0:root:/root:/bin/bash"], "ops": ["ops:x:1000:1000::/home/ops:/bin/bash"]}
SECTIONS: dict[str, Any] = {"accounts": {"/etc/passwd": PASSWD, "/etc/group": {"ops": ["ops:x:1000:"]}}}
SCOPE = Scope(17, "lease17", 20017, 20017, "/home/lease17", SECTIONS)


def order(**changed: Any) -> dict[str, Any]:
    return {
        "lease_id": 17,
        "machine_id": 1,
        "login": "lease17",
        "uid": 20017,
        "baseline": {"sections": SECTIONS},
    } | changed


def a_step(*looks: list[str] | Exception, act: Exception | None = None) -> Step:
    """A step whose looks answer one after the other, and whose act claims success or fails."""
    answers = iter(looks)

    def look(_scope: Scope) -> Iterator[Finding]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return iter([Finding(text, text) for text in answer])

    def do(_scope: Scope, _found: list[Finding]) -> Iterator[str]:
        yield "removed everything"
        if act is not None:
            raise act

    return Step("a_step", look, do)


# --- a step


def test_a_step_that_claims_success_fails_by_what_is_still_there() -> None:
    step = a_step(["/tmp/left"], ["/tmp/left"]).run(SCOPE, before=None)
    assert (step["result"], step["reason"], step["acted"]) == ("failed", "/tmp/left", ["removed everything"])


def test_a_step_that_broke_down_passes_when_nothing_is_left() -> None:
    step = a_step(["/tmp/left"], [], act=OSError("half-way")).run(SCOPE, before=None)
    assert (step["result"], step["acted"][-1]) == ("passed", "stopped by OSError: half-way")


def test_what_could_not_be_looked_at_is_unknown_and_not_passed() -> None:
    step = a_step(["/tmp/left"], PermissionError("no")).run(SCOPE, before=None)
    assert (step["result"], step["reason"]) == ("unknown", "could not look: PermissionError: no")


def test_a_step_does_not_act_when_there_is_nothing() -> None:
    assert a_step([], []).run(SCOPE, before=None)["acted"] == []


def test_a_step_that_acts_anyway_does_not_trust_an_empty_look() -> None:
    step = replace(a_step([], []), acts_anyway=True).run(SCOPE, before=None)
    assert (step["acted"], step["result"]) == (["removed everything"], "passed")


def test_a_step_without_its_subject_is_not_applicable() -> None:
    step = a_step(NotApplicable("no engine"), NotApplicable("no engine")).run(SCOPE, before=None)
    assert (step["result"], step["reason"]) == ("not_applicable", "no engine")


def test_a_name_chosen_by_a_tenant_cannot_break_the_report() -> None:
    step = a_step([], ["/tmp/\udcff\n; rm -rf /"]).run(SCOPE, before=None)
    assert step["reason"] == "/tmp/\\xff\\n; rm -rf /"


def test_a_flood_of_findings_stays_within_the_protocols_limits() -> None:
    many = [f"/tmp/{number:05}-{'x' * 100}" for number in range(5000)]
    step = a_step(many, many).run(SCOPE, before=None)
    assert len(step["reason"]) <= 2000
    assert (step["after"]["count"], len(step["after"]["found"])) == (5000, 500)


@pytest.mark.parametrize("character", ["\N{PILE OF POO}", "\udcff", "\a", '"'])
def test_however_a_tenant_names_his_files_the_report_is_below_what_the_portal_takes(character: str) -> None:
    """Three trees of deep paths made one of 17 MB, which went with every report: the portal heard nothing any more."""
    paths = [f"/home/lease17/{number:03}/{'/'.join([character * 60] * 16)}" for number in range(500)]
    step = a_step(paths, paths).run(SCOPE, before=evidence(Finding(path, path) for path in paths))
    step["acted"] = Step("a_step", lambda _scope: (), lambda *_: paths, acts_anyway=True)._act(SCOPE)
    check = verify._checked("a_check", lambda _asked: paths, verify.Asked(None, None, None, {}))
    for said in (step, check):
        assert len(json.dumps(said)) * len(cleaning.STEPS) < LARGEST_MESSAGE_BYTES * 0.9
    for seen in (step["before"], step["after"], check["evidence"]):
        assert (seen["count"], len(seen["found"]) > 4) == (500, True)
    assert step["acted"][-1] == f"… and {501 - len(step['acted'])} more"


def test_a_million_findings_are_counted_and_not_kept() -> None:
    def look(_scope: Scope) -> Iterator[Finding]:
        return (Finding(f"/data/{number}", f"/data/{number} of uid 20017") for number in range(30_000))

    def act(_scope: Scope, found: Iterable[Finding]) -> Iterator[str]:
        return (f"removed {finding.subject}" for finding in found)

    tracemalloc.start()
    step = Step("a_step", look, act, streams=True)
    report = step.run(SCOPE, step.first_look(SCOPE))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2e6
    assert [report[name]["count"] for name in ("before", "after")] == [30_000, 30_000]
    assert report["reason"].endswith("… (30000 in all)")
    assert len(report["acted"]) == 500


def test_a_step_that_streams_acts_while_it_looks_and_tells_where_it_stopped() -> None:
    left = [f"/data/{number}" for number in range(3)]

    def look(_scope: Scope) -> Iterator[Finding]:
        return (Finding(path, path) for path in list(left))

    def act(_scope: Scope, found: Iterable[Finding]) -> Iterator[str]:
        for finding in found:
            left.remove(finding.subject)
            yield f"removed {finding.subject}"
        raise OSError("the rest is out of reach")

    step = Step("a_step", look, act, streams=True).run(SCOPE, before=None)
    assert (step["result"], step["acted"][0]) == ("passed", "removed /data/0")
    assert step["acted"][-1] == "stopped by OSError: the rest is out of reach"


# --- ground that a tenant has prepared


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scope:
    """A tenant whose files are those of whoever runs the test, on a machine that consists of one folder."""
    monkeypatch.setattr(mounts, "local", lambda: [str(tmp_path)])
    monkeypatch.setattr(data, "TEMPORARY_FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(special, "STORES", ())
    here = Scope(17, "lease17", os.getuid(), os.getgid(), str(tmp_path), SECTIONS | {"special_files": {}})
    here.__dict__.update(uids=frozenset({os.getuid()}), subordinate_uids=())
    return here


def test_a_tree_deeper_than_any_path_is_named_and_removed_and_takes_no_longer_for_its_depth(mine: Scope) -> None:
    folder = os.open(mine.home, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d" * 200, dir_fd=folder)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    found = [finding.subject for finding in data.look_for_files(mine)]
    assert {each.is_too_deep for each in found[:-1]} == {False}
    assert found[-1].is_too_deep
    assert len(found) < 25
    stranger = replace(
        mine, gid=20017
    )  # somebody else's deep folder is no proof that there is nothing of the tenant's in it
    stranger.__dict__.update(uids=frozenset({20017}), subordinate_uids=())
    assert [finding.subject for finding in data.look_for_files(stranger)] == found[-1:]
    assert list(restored.look_for_special_files(mine)) == []
    list(data.remove_files(mine, data.look_for_files(mine)))
    assert list(data.look_for_files(mine)) == []
    assert list(Path(mine.home).iterdir()) == []


def test_a_folder_with_very_many_names_is_walked_and_emptied_without_a_list_of_them(mine: Scope) -> None:
    folder = Path(mine.home, "many")
    folder.mkdir()
    for number in range(5_000):
        os.close(os.open(folder / f"{number:0200}", os.O_CREAT | os.O_WRONLY))
    tracemalloc.start()
    assert evidence(data.look_for_files(mine))["count"] == 5_001
    list(data.remove_paths(mine, data.look_for_temporary_files(mine)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1.5e6
    assert list(Path(mine.home).iterdir()) == []


def test_a_temporary_file_that_goes_while_we_look_is_no_trouble(mine: Scope) -> None:
    for number in range(3):
        Path(mine.home, str(number)).touch()
    look = data.look_for_temporary_files(mine)
    seen = next(look).subject
    for other in {"0", "1", "2"} - {Path(seen).name}:
        Path(mine.home, other).unlink()
    assert list(look) == []


def test_links_in_place_of_the_folder_of_user_units_lead_nowhere(mine: Scope) -> None:
    elsewhere = Path(mine.home, "elsewhere", "systemd")
    elsewhere.mkdir(parents=True)
    (elsewhere / "his.service").touch()
    config = Path(mine.home, ".config")
    config.symlink_to("elsewhere")
    assert unit_files(mine) == []
    config.unlink()
    config.mkdir()
    (config / "systemd").symlink_to("/")
    assert unit_files(mine) == [f"{config}/systemd"]
    list(remove.remove(f"{config}/systemd"))
    (config / "systemd" / "user").mkdir(parents=True)
    (config / "systemd" / "user" / "left.service").symlink_to(elsewhere / "his.service")
    assert unit_files(mine) == [f"{config}/systemd/user", f"{config}/systemd/user/left.service"]


def unit_files(here: Scope) -> list[str]:
    return [each for name in (".config/systemd", ".local/share/systemd") for each in files.below(f"{here.home}/{name}")]


def test_the_content_of_a_tenants_own_set_uid_files_is_never_read(mine: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand sparse ones of 64 MB each would keep the machine busy for hours."""
    path = Path(mine.home, "left")
    path.write_text("#!")
    path.chmod(0o4755)
    monkeypatch.setattr(files, "read_no_follow", lambda path: pytest.fail(f"read {path}"))
    assert [finding.text for finding in restored.look_for_special_files(mine)] == [
        f"{path} (mode 4755) is not in the baseline"
    ]
    monkeypatch.setattr(special, "packaged_paths", lambda: frozenset[str]())
    list(restored.disarm_special_files(mine, restored.look_for_special_files(mine)))
    assert not path.exists()


def test_a_program_that_an_upgrade_has_brought_is_no_tenants(mine: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its content alone, and as the package says: else each upgrade of sudo would quarantine a fleet."""
    path, listings = Path(mine.home, "sudo"), Path(mine.home, "info")
    listings.mkdir()
    path.write_text("the one before")
    path.chmod(0o4755)
    monkeypatch.setattr(packages, "INFO", str(listings))
    known = {str(path): {**(files.look_at(str(path)) or {}), "capabilities": None}}
    here = replace(mine, sections=mine.sections | {"special_files": known})
    path.write_text("the new one")
    path.chmod(0o4755)
    changed = f"{path} (mode 4755) has another content than in the baseline"
    assert [each.text for each in restored.look_for_special_files(here)] == [changed]
    digest = hashlib.md5(b"the new one", usedforsecurity=False).hexdigest()
    (listings / "sudo.md5sums").write_text(f"{digest}  {str(path)[1:]}\n")
    assert list(restored.look_for_special_files(here)) == []
    path.chmod(0o6755)
    assert [each.text for each in restored.look_for_special_files(here)] == [
        f"{path} (mode 6755) has another content and mode than in the baseline"
    ]
    path.chmod(0o4755)
    path.write_text("a tenant's")
    path.chmod(0o4755)
    assert [each.text for each in restored.look_for_special_files(here)] == [changed]


def test_a_store_is_walked_where_others_can_enter_it(mine: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(mine.home)
    store = home / "store"
    for name, mode in (("open", 0o755), ("shut", 0o710)):
        (store / name).mkdir(parents=True)
        (store / name / "left").touch()
        (store / name).chmod(mode)
    store.chmod(0o711)
    monkeypatch.setattr(special, "STORES", (str(store),))

    def walked() -> list[str]:
        return sorted(each.path for each in special.walk())

    assert walked() == [f"{store}/{name}" for name in ("open", "open/left", "shut")], "the store itself is nobody's"
    store.chmod(0o710)
    assert walked() == []
    monkeypatch.setattr(mounts, "local", lambda: [f"{store}/open", f"{store}/gone"])
    assert walked() == [], "what is mounted there is as far away"
    store.chmod(0o711)
    assert walked() == [f"{store}/open/left"]


def test_a_store_that_was_opened_is_shut_before_anything_is_looked_for(
    mine: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Path(mine.home, "store")
    store.mkdir()
    layer = store / "layer"
    layer.touch()
    layer.chmod(0o4755)
    store.chmod(0o710)
    monkeypatch.setattr(special, "STORES", (str(store),))
    here = replace(mine, sections=mine.sections | {"stores": baseline.read_rights([str(store)])})
    store.chmod(0o755)
    done = list(restored.disarm_special_files(here, restored.look_for_special_files(here)))
    assert done == [f"put back owner and mode of {store}"]
    assert (layer.stat().st_mode & 0o7777, list(restored.look_for_special_files(here))) == (0o4755, [])


def test_what_any_lease_may_write_is_closed_again_and_a_link_in_its_place_not_followed(
    mine: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(special, "_others_reach", lambda _path: True)
    program, folder, elsewhere = (Path(mine.home, name) for name in ("program", "folder", "elsewhere"))
    folder.mkdir()
    for path, mode in ((program, 0o757), (folder, 0o777), (elsewhere, 0o600)):
        path.touch()
        path.chmod(mode)
    here = replace(mine, sections=mine.sections | {"open_files": {}, "temporary_folders": {}})
    here.__dict__.update(uids=frozenset({20017}), subordinate_uids=())
    found = list(restored.look_for_special_files(here))
    assert sorted(finding.text for finding in found) == [
        f"{folder} (mode 777) may be written by any lease",
        f"{program} (mode 757) may be written by any lease",
    ]
    list(restored.disarm_special_files(here, found))
    assert [oct(path.stat().st_mode & 0o7777) for path in (program, folder)] == ["0o755", "0o775"]
    assert list(restored.look_for_special_files(here)) == []
    program.unlink()
    program.symlink_to(elsewhere)
    assert "could not put back" in "".join(restored.disarm_special_files(here, found))
    assert elsewhere.stat().st_mode & 0o7777 == 0o600


def test_what_lies_among_the_tasks_and_is_of_no_task_goes(mine: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TASK_FOLDERS", mine.home)
    monkeypatch.setattr(processes, "_units", lambda _pattern: [])
    stranger = replace(mine, gid=20017)
    for name in ("17", ".left"):
        Path(mine.home, name).mkdir()
    assert [finding.subject for finding in processes.look_for_tasks(stranger)] == [f"{mine.home}/.left"]
    list(processes.end_tasks(stranger, list(processes.look_for_tasks(stranger))))
    assert [path.name for path in Path(mine.home).iterdir()] == ["17"]


def test_what_was_put_among_a_packages_units_goes_and_what_a_package_took_over_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("left.service", "adopted.service", "his.service")
    for name in names:
        (tmp_path / name).write_text("[Service]\n")
    left, adopted, his = (str(tmp_path / name) for name in names)
    packaged: set[str] = set()
    monkeypatch.setattr(baseline, "LOADED_BY_ITSELF", (str(tmp_path),))
    monkeypatch.setattr(special, "packaged_paths", lambda: frozenset(packaged))
    before = {
        path: entry for path, entry in baseline.read_unpackaged([str(tmp_path)]).items() if path in (adopted, his)
    }
    here = replace(SCOPE, sections=SECTIONS | {"unpackaged": before})
    packaged.update({adopted, str(tmp_path)})
    Path(his).unlink()
    assert [finding.text for finding in restored._unpackaged(here)] == [
        f"{his} is missing",
        f"{left} is not in the baseline",
    ]
    list(restored.put_back(here, list(restored._unpackaged(here))))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adopted.service", "his.service"]
    assert list(restored._unpackaged(SCOPE)) == [], "an older baseline does not tell which was there"


def test_what_the_kernel_was_told_to_start_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files in place of the kernel's own settings, which this machine needs."""
    pattern = tmp_path / "core_pattern"
    pattern.write_text("core\n")
    monkeypatch.setattr(baseline, "_STARTED_BY_THE_KERNEL", (str(pattern), str(tmp_path / "none")))
    here = replace(SCOPE, sections=SECTIONS | {"modules": modules.loaded()})
    known = replace(here, sections=here.sections | {"kernel_programs": baseline.read_kernel_programs()})
    asked = verify.Asked(None, None, None, known.sections)
    assert [list(kernel.look_for_modules(known)), list(verify._kernel_programs(asked))] == [[], []]
    pattern.write_text("|/tmp/left\n")
    assert [each.text for each in kernel.look_for_modules(known)] == [
        f"{pattern} is not as in the baseline: |/tmp/left"
    ]
    assert list(verify._kernel_programs(asked)) == [f"{pattern} is not as in the baseline"]
    with contextlib.suppress(NotApplicable):
        assert list(kernel.look_for_modules(here)) == [], "an older baseline does not tell"
    assert list(verify._kernel_programs(replace(asked, sections=here.sections))) == []
    list(kernel.put_back_programs(known, list(kernel.look_for_modules(known))))
    assert (pattern.read_text(), list(kernel.look_for_modules(known))) == ("core\n", [])


def test_a_setting_that_an_upgrade_has_brought_stays_and_a_tenants_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else dpkg takes the one of before for an operator's, and asks at every upgrade from then on."""
    setting, status = tmp_path / "etc" / "service.conf", tmp_path / "status"
    setting.parent.mkdir()
    monkeypatch.setitem(baseline.FILE_ROOTS, "hosts", (str(setting.parent),))
    monkeypatch.setattr(packages, "STATUS", str(status))
    look = restored.look_for_changes("hosts")

    def release(content: str) -> None:
        digest = hashlib.md5(content.encode(), usedforsecurity=False).hexdigest()
        status.write_text(f"Package: service\nConffiles:\n {setting} {digest}\nDescription: serves\n")

    def as_now(content: str) -> Scope:
        setting.write_text(content)
        return replace(
            SCOPE,
            sections=SECTIONS | {"hosts": baseline.read_files("hosts", []), "conffiles": baseline.read_conffiles()},
        )

    release("first")
    before, changed = as_now("first"), as_now("an operator's")
    release("second")
    setting.write_text("second")
    assert list(look(before)) == []
    put_back = [f"{setting} has another content than in the baseline"]
    assert [each.text for each in look(changed)] == put_back, "an upgrade leaves what an operator has changed"
    older = {key: value for key, value in before.sections.items() if key != "conffiles"}
    assert [each.text for each in look(replace(before, sections=older))] == put_back
    setting.write_text("a tenant's")
    assert [each.text for each in look(before)] == put_back
    list(restored.put_back(before, list(look(before))))
    assert setting.read_text() == "first"


def test_a_rule_for_the_next_boot_goes_from_our_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = tmp_path / "firewall.nft"
    rules.write_text("drop\n")
    monkeypatch.setattr(baseline, "OWN_SETTINGS", str(tmp_path))
    monkeypatch.setattr(restored, "look_for_changes", lambda _section: lambda _scope: iter(()))
    here = replace(SCOPE, sections=SECTIONS | {"own_settings": baseline.read_own_settings()})
    assert list(settings.look_for_settings(here)) == []
    rules.write_text("accept\n")
    (tmp_path / "left.nft").touch()
    found = list(settings.look_for_settings(here))
    assert [finding.subject[0] for finding in found] == [str(rules), str(tmp_path / "left.nft")]
    list(restored.put_back(here, found))
    assert (rules.read_text(), list(settings.look_for_settings(here))) == ("drop\n", [])
    rules.write_text("accept\n")
    assert list(settings.look_for_settings(SCOPE)) == [], "an older baseline does not tell of them"


# --- whom an order may touch


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"login": "ops", "uid": 1000}, "no login of a lease"),
        ({"login": "lease17;id"}, "no login of a lease"),
        ({"uid": 0}, "no login of a lease"),
        ({"uid": 60000}, "no login of a lease"),
        ({"baseline": {"sections": {"accounts": {"/etc/passwd": {"x": ["x:x:20017:1::/x:/x"]}}}}}, "in the baseline"),
        ({"baseline": {"sections": {"accounts": {"/etc/passwd": {"x": ["lease17:x:9:1::/x:/x"]}}}}}, "in the baseline"),
    ],
)
def test_an_order_for_somebody_else_is_refused(changed: dict[str, Any], why: str) -> None:
    if "sections" in changed.get("baseline", {}):
        passwd = changed["baseline"]["sections"]["accounts"]["/etc/passwd"]
        changed["baseline"]["sections"]["accounts"]["/etc/passwd"] = {
            line.split(":")[0]: [line] for lines in passwd.values() for line in lines
        }
    with pytest.raises(Refused, match=why):
        scope.of(order(**changed))


@pytest.mark.parametrize("home", ["/", "/home", "/home/ops", "/root", "relative"])
def test_a_home_that_others_live_in_is_refused(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    user = accounts.User("lease17", 20017, 20017, home, "/bin/bash")
    monkeypatch.setattr(accounts, "find_user", lambda _login: user)
    with pytest.raises(Refused, match="not only its own"):
        scope.of(order())


def test_another_lease_that_is_open_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lease18").write_text("ssh-ed25519 AAAA\n")
    monkeypatch.setattr(scope, "LEASE_KEYS", str(tmp_path))
    monkeypatch.setattr(
        accounts, "users", lambda _=None: [accounts.User("lease18", 20018, 20018, "/home/lease18", "/x")]
    )
    monkeypatch.setattr(accounts, "is_expired", lambda _login: False)
    with pytest.raises(Refused, match="lease18 is open"):
        scope._refuse_while_another_lease_is_open("lease17")
    monkeypatch.setattr(accounts, "is_expired", lambda _login: True)
    scope._refuse_while_another_lease_is_open("lease17")


def test_the_tenants_are_the_lease_and_whoever_came_since_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    added = [
        accounts.User(name, uid, uid, "/x", "/x") for name, uid in (("mallory", 4242), ("toor", 0), ("chrony", 107))
    ]
    monkeypatch.setattr(accounts, "users", lambda lines=None: accounts_of(lines) if lines else added)
    monkeypatch.setattr(
        accounts, "lines", lambda path: {"lease17": ["lease17:100000:65536"]} if path == "/etc/subuid" else {}
    )
    here = Scope(17, "lease17", 20017, 20017, "/home/lease17", SECTIONS)
    assert [uid for uid in (0, 107, 1000, 4242, 20017, 20018) if here.is_tenants(uid)] == [4242, 20017]
    assert here.owns(20018), "what an earlier lease left behind counts too"
    assert not here.owns(1000)
    assert (here.is_its_group(20017), here.is_its_group(1000)) == (True, False)


def accounts_of(passwd: dict[str, list[str]]) -> list[accounts.User]:
    fields = [line.split(":") for lines in passwd.values() for line in lines]
    return [accounts.User(f[0], int(f[2]), int(f[3]), f[5], f[6]) for f in fields]


# --- the tables


def test_every_step_has_a_check_that_looks_with_other_eyes() -> None:
    assert {step.id for step in cleaning.STEPS} - verify.CHECKS.keys() - {"loader"} == set()
    assert "loader" in verify.CHECKS


def test_the_agent_says_what_the_protocol_requires_of_a_clean_host() -> None:
    said = json.loads((Path(__file__).parents[3] / "agent/protocol/protocol.schema.json").read_text())["definitions"]
    assert {step.id for step in cleaning.STEPS} == set(said["cleaning_step"]["enum"])
    assert verify.CHECKS.keys() == set(said["host_check"]["enum"])


def test_every_section_of_files_is_restored_and_verified() -> None:
    steps = {step.id for step in cleaning.STEPS}
    assert set(baseline.FILE_SECTIONS) <= steps
    assert set(baseline.FILE_SECTIONS) <= verify.CHECKS.keys()


def test_nothing_is_started_before_the_loaders_settings_are_back_and_the_account_goes_last() -> None:
    names = [step.id for step in cleaning.STEPS]
    assert (names[0], names[-1]) == ("loader", "account")
    assert names.index("access") < names.index("system_units") < names.index("processes") < names.index("connections")
    assert names.index("processes") < names.index("mounts") < names.index("home") < names.index("owned_files")
    assert names.index("users") < names.index("owned_files"), "/etc/shadow may be owned by the tenant"


def test_the_table_of_dirt_names_steps_and_checks_that_exist() -> None:
    assert len(WAYS) == len({way.name for way in WAYS}) >= 25
    assert {way.id for way in WAYS} <= verify.CHECKS.keys()
    assert {way.step_id for way in WAYS} <= {step.id for step in cleaning.STEPS}


# --- the ruleset

DOCKERS = {"family": "ip", "table": "nat", "chain": "POSTROUTING", "expr": [{"match": {"right": "docker0"}}]}
OWN = {
    "family": "inet",
    "table": "remotegpu",
    "chain": "input",
    "handle": 7,
    "expr": [{"counter": {"packets": 3, "bytes": 9}}],
}


def table(*items: dict[str, Any], text: str | None = None) -> dict[str, Any]:
    return {"items": list(items), "rules": []} | ({"text": text} if text is not None else {})


def test_what_docker_writes_for_its_containers_is_left_to_docker() -> None:
    assert firewall.is_dockers({"rule": DOCKERS})
    assert firewall.is_dockers({"chain": {"family": "ip", "table": "filter", "name": "DOCKER-USER"}})
    assert not firewall.is_dockers({"rule": DOCKERS | {"family": "inet"}}), (
        "our own table is ours, whatever it mentions"
    )
    assert not firewall.is_dockers({"rule": OWN})


def test_counters_handles_and_openings_are_no_difference() -> None:
    counted = OWN | {"handle": 9, "expr": [{"counter": {"packets": 4, "bytes": 10}}]}
    assert firewall.normal({"rule": OWN}) == firewall.normal({"rule": counted})
    openings = {"family": "inet", "table": "remotegpu", "name": "openings", "flags": ["interval", "timeout"]}
    assert firewall.normal({"set": openings}) == firewall.normal({"set": openings | {"elem": [8888]}})


def test_a_changed_table_is_restored_and_a_foreign_one_deleted() -> None:
    before, now = table({"rule": {"a": 1}}, text="table inet remotegpu {}"), table({"rule": {"a": 2}}, text="")
    assert [each.subject[0] for each in network._differences("inet remotegpu", before, now)] == ["restore"]
    assert [each.subject[0] for each in network._differences("inet remotegpu", before, None)] == ["restore"]
    assert [each.subject[0] for each in network._differences("inet left", None, now)] == ["delete"]
    assert list(network._differences("inet remotegpu", before, before)) == []


def test_a_rule_added_to_iptables_tables_is_deleted_and_a_missing_one_named() -> None:
    before, now = table({"rule": {"a": 1}}), table({"rule": {"a": 1}}, {"rule": {"a": 1}})
    assert [each.subject[0] for each in network._differences("ip filter", before, now)] == ["item"]
    assert [each.subject[0] for each in network._differences("ip filter", now, before)] == ["gone"]


UPGRADED = [
    ("/usr/sbin/sshd (deleted)", "/usr/sbin/sshd"),
    ("/tmp/sshd (deleted)", "/tmp/sshd (deleted)"),
    ("/usr/sbin/sshd", "/usr/sbin/sshd"),
]


@pytest.mark.parametrize(("program", "name"), UPGRADED)
def test_a_packages_daemon_that_runs_on_after_its_upgrade_is_the_same(program: str, name: str) -> None:
    assert ports._name(program, lambda: frozenset({"/usr/sbin/sshd"})) == name


def test_a_daemon_that_was_upgraded_before_the_baseline_is_the_same_once_it_is_started_again() -> None:
    before = {"protocol": "tcp", "address": "0.0.0.0", "port": 22, "program": "/usr/sbin/sshd (deleted)"}
    assert [each["program"] for each in ports.known([before])] == ["/usr/sbin/sshd (deleted)", "/usr/sbin/sshd"]


def test_a_service_on_another_free_port_is_the_same_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remotegpu_agent.observe.ports.first_ephemeral", lambda: 32768)
    port = {"protocol": "tcp", "address": "127.0.0.1", "port": 40000, "program": "/usr/bin/containerd"}
    assert network._key(port) == network._key(port | {"port": 40001})
    assert network._key(port) != network._key(port | {"program": "/tmp/x"})
    assert network._key(port) != network._key(port | {"address": "0.0.0.0"})
    assert network._key(port | {"program": "?"}) != network._key(port | {"program": "?", "port": 40001})


# --- passwords


def test_a_password_never_leaves_the_host_and_comes_back_to_its_line() -> None:
    line = "ops:$y$j9T$secret:20000:0:99999:7:::"
    masked = accounts.masked(line)
    assert "secret" not in masked
    assert accounts.unmasked(masked, [line.replace("99999", "1")]) == line
    assert accounts.unmasked(masked, ["ops:$y$other:20000:0:99999:7:::"]) is None
    assert accounts.masked("daemon:*:20000:0:99999:7:::") == "daemon:*:20000:0:99999:7:::"


def test_accounts_are_put_back_in_their_places_and_a_packages_user_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {"chrony": 107, "mallory": 4242, "toor": 0, "ops": 1000}
    monkeypatch.setattr(accounts, "find_user", lambda name: accounts.User(name, ids[name], ids[name], "/x", "/x"))
    monkeypatch.setattr(accounts, "find_gid", lambda _name: None)
    known = {"root": ["root:x:0:"], "ops": ["ops:x:1000:"]}
    now = ["toor:x:0:", "root:x:0:", "ops:x:0:", "mallory:x:4242:", "chrony:x:107:"]
    better = {name: restored._good_lines("/etc/passwd", name, known, now) for name in ids}
    assert better == {"chrony": None, "mallory": [], "toor": [], "ops": ["ops:x:1000:"]}
    kept = restored._replaced(now, {name: lines for name, lines in better.items() if lines is not None})
    assert kept == ["root:x:0:", "ops:x:1000:", "chrony:x:107:"]


def test_a_file_of_accounts_is_written_anew_with_its_rights_and_not_through_a_planted_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow, elsewhere = tmp_path / "shadow", tmp_path / "elsewhere"
    shadow.write_text("root:*:::::::\n")
    shadow.chmod(0o666)
    elsewhere.touch()
    (tmp_path / "shadow.remotegpu").symlink_to(elsewhere)
    rights = files.rights(str(shadow)) or {}
    known = {"accounts": {}, "account_files": {str(shadow): rights | {"mode": 0o640}}}
    here = replace(SCOPE, sections=known)
    [finding] = restored._changed_rights(here, str(shadow))
    assert finding.text == f"{shadow} has another owner or mode than in the baseline"
    monkeypatch.setattr(restored, "_accounts_locked", contextlib.nullcontext)
    assert list(restored.put_back_accounts(here, [finding])) == [f"put back owner and mode of {shadow}"]
    assert list(restored._changed_rights(here, str(shadow))) == []
    assert (shadow.read_text(), elsewhere.read_text()) == ("root:*:::::::\n", "")
