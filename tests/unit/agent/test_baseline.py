"""What the baseline looks at and what it leaves out, on plain files and recorded texts."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent import baseline
from remotegpu_agent.observe import files, modules, mounts, packages, ports, processes, special
from remotegpu_agent.observe.tools import ToolFailed, printable, run


def test_a_snapshot_says_what_is_there_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "one").write_text("1")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("s")
    (tmp_path / "conf.d" / "link").symlink_to(tmp_path / "outside")
    found = files.snapshot([str(tmp_path / "conf.d")], keep=lambda _path: True)
    assert [(Path(path).name, entry["type"]) for path, entry in found.items()] == [
        ("conf.d", "directory"),
        ("link", "link"),
        ("one", "file"),
    ]
    assert files.content_of(found[str(tmp_path / "conf.d" / "one")]) == b"1"


def test_content_is_no_difference_but_every_fact_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    bare, full = files.look_at(str(path)), files.look_at(str(path), content=True)
    assert files.same(bare, full)
    assert not files.same(bare, None)
    path.write_text("two")
    path.chmod(0o600)
    assert files.difference(full, files.look_at(str(path))) == "has another content and mode than in the baseline"
    assert files.difference(None, bare) == "is not in the baseline"


def test_a_file_that_is_not_there_or_no_longer_is_has_no_entry_and_stops_nothing(tmp_path: Path) -> None:
    """As of a host without agent.json and ca.pem, and of whatever goes while the folder is walked."""
    there, gone = tmp_path / "there", tmp_path / "gone"
    there.write_text("one")
    gone.write_text("two")
    there.chmod(0o644)

    def skip(path: str) -> bool:
        gone.unlink(missing_ok=True)
        return False

    assert baseline._is_public(str(there))
    assert list(files.snapshot([str(gone), str(there)], skip=skip, keep=baseline._is_public)) == [str(there)]


def test_a_pipe_in_the_place_of_a_file_does_not_make_us_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    entry = files.look_at(str(tmp_path / "pipe"), content=True)
    assert entry is not None
    assert (entry["type"], "content" in entry) == ("special", False)


@pytest.mark.parametrize(
    ("section", "path", "left_out"),
    [
        ("etc", "/etc/sudoers.d", True),
        ("etc", "/etc/rc3.d", True),
        ("etc", "/etc/shadow", True),
        ("etc", "/etc/shadow-", True),
        ("etc", "/etc/resolv.conf", True),
        ("etc", "/etc/remotegpu", True),
        ("etc", "/etc/update-motd.d", False),
        ("etc", "/etc/apt", False),
        ("etc", "/etc/shadows", False),
        ("at_jobs", "/var/spool/cron/atjobs/.SEQ", True),
        ("at_jobs", "/var/spool/cron/atjobs/a0001", False),
        ("ssh_keys", "/home/ops/.ssh/known_hosts", True),
        ("ssh_keys", "/home/ops/.ssh/authorized_keys", False),
        ("local_programs", "/usr/local/lib/systemd", True),
    ],
)
def test_every_path_belongs_to_one_section_and_what_changes_by_itself_to_none(
    section: str, path: str, left_out: bool
) -> None:
    assert baseline.is_left_out(section, path) is left_out


@pytest.mark.parametrize(
    ("path", "carried"),
    [
        ("/etc/ssh/ssh_host_ed25519_key", False),
        ("/etc/ssh/ssh_host_ed25519_key.pub", True),
        ("/home/ops/.ssh/id_ed25519", False),
        ("/home/ops/.ssh/authorized_keys", True),
        ("/root/.ssh/authorized_keys2", True),
        ("/etc/sudoers", True),
    ],
)
def test_the_content_of_a_private_key_is_never_carried(path: str, carried: bool) -> None:
    assert baseline._is_no_secret(path) is carried


def test_content_beyond_the_limit_is_kept_as_a_digest_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "CONTENT_LIMIT_BYTES", 10)
    sections = {name: {} for name in baseline.FILE_SECTIONS}
    sections["loader"] = {"/a": {"sha256": "1", "content": "12345678"}}
    sections["etc"] = {"/b": {"sha256": "2", "content": "12345678"}}
    kept = baseline._within_limit(sections)
    assert (kept["loader"]["/a"], kept["etc"]["/b"]) == ({"sha256": "1", "content": "12345678"}, {"sha256": "2"})


def test_homes_are_those_of_people_and_root() -> None:
    passwd = {
        "root": ["root:x:0:0:root:/root:/bin/bash"],
        "daemon": ["daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin"],
        "nobody": ["nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin"],
        "ops": ["ops:x:1000:1000::/home/ops:/bin/bash"],
    }
    assert baseline.homes_of({"accounts": {"/etc/passwd": passwd}}) == ["/home/ops", "/root"]


def test_a_mount_line_is_read_with_its_escapes() -> None:
    line = r"36 35 98:0 /mnt1 /home/a\040b rw,noatime master:1 - ext4 /dev/root rw"
    assert mounts.listed(line) == [mounts.Mount("/home/a b", "ext4", "/dev/root", "98:0", "/mnt1")]


@pytest.mark.parametrize(
    ("target", "fstype", "is_the_systems"),
    [
        ("/run/user/20017", "tmpfs", True),
        ("/var/lib/docker/overlay2/x/merged", "overlay", True),
        ("/run/credentials/a.service", "tmpfs", True),
        ("/home/lease17/mount", "tmpfs", False),
        ("/proc/sys/fs/binfmt_misc", "binfmt_misc", True),
        ("/sys/kernel/debug", "debugfs", True),
        ("/sys/kernel/debug", "tmpfs", False),
        ("/proc/fs", "ext4", False),
        ("/proc/4711", "proc", False),
        ("/proc/4711/root", "proc", False),
    ],
)
def test_mounts_that_the_system_makes_as_it_runs_are_not_in_the_baseline(
    target: str, fstype: str, is_the_systems: bool
) -> None:
    assert mounts.comes_and_goes(target, fstype) is is_the_systems


def test_an_older_baseline_says_nothing_of_what_a_container_hides_of_the_host() -> None:
    older: dict[str, Any] = {}
    said = [("/proc/acpi", "tmpfs"), ("/proc/acpi", "ext4"), ("/mnt", "tmpfs")]
    assert [baseline.is_told_of(older, *mount) for mount in said] == [False, True, True]
    assert [baseline.is_told_of({"stores": {}}, *mount) for mount in said] == [True, True, True]


def test_addresses_are_read_as_the_kernel_writes_them() -> None:
    assert ports._endpoint("0100007F:0016") == ("127.0.0.1", 22)
    assert ports._endpoint("00000000000000000000000001000000:0050") == ("::1", 80)


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("/system.slice/ssh.service", "ssh.service"),
        ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service"),
        ("/user.slice/user-20017.slice/session-3.scope", None),
    ],
)
def test_a_process_is_known_by_its_service(cgroup: str, unit: str | None) -> None:
    process = processes.Process(1, 1, "S", "x", frozenset({0}), frozenset({0}), None, (cgroup,))
    assert process.unit == unit
    assert process.in_slice_of(20017) is (unit is None)
    assert not process.in_slice_of(2001), "user-20017.slice is not user-2001.slice"


def test_a_missing_or_failing_program_is_said_and_never_taken_for_an_empty_answer() -> None:
    with pytest.raises(ToolFailed, match="is not installed"):
        run(["no-such-program-anywhere"])
    with pytest.raises(ToolFailed, match="exited with"):
        run(["sh", "-c", "echo broken >&2; exit 3"])
    with pytest.raises(ToolFailed, match="no answer within"):
        run(["sleep", "60"], timeout_s=0.05)


def test_names_are_printable_whatever_bytes_they_have() -> None:
    assert printable("/tmp/\udcfftab\there") == "/tmp/\\xfftab\\there"
    assert printable("中文") == "中文"


# --- who may read and write the files of accounts

DEBIANS = {"is_file": True, "mode": 0o640, "uid": 0, "gid": 42, "has_acl": False}
OLDER: dict[str, Any] = {"accounts": {"/etc/group": {"shadow": ["shadow:x:42:"]}}}
NEWER = OLDER | {"account_files": {"/etc/shadow": DEBIANS | {"mode": 0o600}}}


@pytest.mark.parametrize(
    ("changed", "is_good"),
    [
        ({}, True),
        ({"mode": 0o600, "gid": 0}, True),
        ({"mode": 0o660}, False),
        ({"mode": 0o644}, False),
        ({"uid": 20017}, False),
        ({"gid": 20017}, False),
        ({"has_acl": True}, False),
        ({"is_file": False}, False),
    ],
)
@pytest.mark.parametrize("path", ["/etc/shadow", "/etc/shadow-"])
def test_a_host_enrolled_before_the_section_is_held_to_what_debian_gives(
    path: str, changed: dict[str, Any], is_good: bool
) -> None:
    now = DEBIANS | changed
    assert baseline.good_rights(OLDER, path, now) == (now if is_good else DEBIANS)


def test_a_file_of_accounts_is_as_in_the_baseline_and_its_copy_no_looser() -> None:
    strict = DEBIANS | {"mode": 0o600}
    assert baseline.good_rights(NEWER, "/etc/shadow", DEBIANS) == strict
    assert baseline.good_rights(NEWER, "/etc/shadow", None) == strict
    assert baseline.good_rights(NEWER, "/etc/shadow-", DEBIANS) == strict
    assert baseline.good_rights(NEWER, "/etc/shadow-", DEBIANS | {"mode": 0o400})["mode"] == 0o400


def test_what_everybody_needs_of_accounts_is_readable_by_everybody() -> None:
    assert baseline.good_rights(OLDER, "/etc/passwd", None)["mode"] == 0o644
    assert baseline.good_rights(OLDER, "/etc/subuid-", None) == DEBIANS | {"mode": 0o644, "gid": 0}


STORE = {"is_file": False, "mode": 0o710, "uid": 0, "gid": 0, "has_acl": False}


@pytest.mark.parametrize(
    ("now", "good"),
    [
        ({}, {}),
        ({"mode": 0o711}, {"mode": 0o711}),
        ({"mode": 0o755}, {"mode": 0o750}),
        ({"mode": 0o773}, {"mode": 0o751}),
        ({"gid": 100000}, {"gid": 100000}),
        ({"gid": 20018}, {"gid": 0}),
        ({"uid": 20018}, {"uid": 0}),
        ({"has_acl": True}, {}),
    ],
)
def test_a_store_of_which_an_older_baseline_says_nothing_is_roots_and_not_listed_by_others(
    now: dict[str, Any], good: dict[str, Any]
) -> None:
    assert baseline.good_store({}, "/var/lib/docker", STORE | now) == STORE | good


def test_a_store_may_be_stricter_than_in_the_baseline_and_not_more_open() -> None:
    known = {"stores": {"/var/lib/docker": STORE | {"mode": 0o711}}}
    for mode, good in ((0o711, 0o711), (0o700, 0o700), (0o715, 0o711)):
        now = STORE | {"mode": mode}
        assert baseline.good_store(known, "/var/lib/docker", now) == STORE | {"mode": good}


# --- what any lease may write to

FILE, FOLDER, BLOCK, CHARACTER = stat.S_IFREG, stat.S_IFDIR, stat.S_IFBLK, stat.S_IFCHR
DISK, NULL, MEMORY, GPU = os.makedev(8, 0), os.makedev(1, 3), os.makedev(1, 1), os.makedev(195, 0)
GROUPS = {"accounts": {"/etc/group": {"remotegpu-leases": ["remotegpu-leases:x:990:lease17"]}}}
KNOWN = GROUPS | {"open_files": {"/tmp": 0o1777, "/data": 0o777, "/srv/note": 0o666, "/home/ops": None}}
WRITTEN, A_DEVICE = "may be written by any lease", "is a device that any lease may open"


@pytest.mark.parametrize(
    ("path", "mode", "gid", "device", "said"),
    [
        ("/usr/bin/python3", FILE | 0o666, 0, 0, WRITTEN),
        ("/usr/bin/python3", FILE | 0o664, 0, 0, None),
        ("/usr/bin/python3", FILE | 0o664, 20018, 0, WRITTEN),
        ("/usr/bin/python3", FILE | 0o664, 990, 0, WRITTEN),
        ("/usr/lib", FOLDER | 0o777, 0, 0, WRITTEN),
        ("/", FOLDER | 0o777, 0, 0, WRITTEN),
        ("/usr/lib", FOLDER | 0o1777, 0, 0, None),
        ("/tmp", FOLDER | 0o1777, 0, 0, None),
        ("/tmp", FOLDER | 0o777, 0, 0, WRITTEN),
        ("/tmp/made/later", FILE | 0o666, 0, 0, None),
        ("/data", FOLDER | 0o777, 0, 0, None),
        ("/data/more", FILE | 0o666, 0, 0, None),
        ("/srv/note", FILE | 0o666, 0, 0, None),
        ("/srv/other", FILE | 0o666, 0, 0, WRITTEN),
        ("/home/ops/new", FILE | 0o666, 0, 0, None),
        ("/home/ops", FOLDER | 0o777, 0, 0, WRITTEN),
        ("/var/lib/disk", BLOCK | 0o666, 0, DISK, A_DEVICE),
        ("/var/lib/disk", BLOCK | 0o660, 6, DISK, None),
        ("/var/lib/disk", BLOCK | 0o640, 20018, DISK, A_DEVICE),
        ("/var/spool/dev/null", CHARACTER | 0o666, 0, NULL, None),
        ("/var/lib/card", CHARACTER | 0o666, 0, GPU, A_DEVICE),
        ("/dev/nvidia0", CHARACTER | 0o666, 0, GPU, None),
        ("/dev/mem", CHARACTER | 0o644, 0, MEMORY, A_DEVICE),
        ("/dev/sda", BLOCK | 0o664, 6, DISK, A_DEVICE),
        ("/dev/anything", FILE | 0o666, 0, 0, None),
    ],
)
def test_what_any_lease_may_write_or_open_is_told_unless_it_could_before(
    path: str, mode: int, gid: int, device: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(special, "_others_reach", lambda _path: True)
    assert baseline.opened(KNOWN, path, mode, gid, device) == said


@pytest.mark.parametrize(
    ("path", "mode", "device", "said"),
    [
        ("/usr/bin/python3", FILE | 0o666, 0, WRITTEN),
        ("/usr", FOLDER | 0o777, 0, WRITTEN),
        ("/home", FOLDER | 0o777, 0, WRITTEN),
        ("/data/his", FILE | 0o666, 0, None),
        ("/data/disk", BLOCK | 0o666, DISK, A_DEVICE),
        ("/tmp", FOLDER | 0o777, 0, WRITTEN),
        ("/var/tmp/x", FILE | 0o666, 0, None),
    ],
)
def test_an_older_baseline_is_no_measure_for_an_operators_data(
    path: str, mode: int, device: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(special, "_others_reach", lambda _path: True)
    older = GROUPS | {"temporary_folders": {"/tmp": {"mode": 0o1777}, "/var/tmp": {"mode": 0o1777}}}
    assert baseline.opened(older, path, mode, 0, device) == said
    assert baseline.good_mode(older, "/tmp", FOLDER | 0o777) == 0o1777


def test_what_others_cannot_reach_is_open_to_nobody(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "his"
    path.touch()
    path.chmod(0o666)
    assert special.opened(str(path), path.stat().st_mode, 0, 0, None) is None
    assert special.opened("/usr/bin/env", FILE | 0o666, 0, 0, None) == WRITTEN


def test_a_tree_that_is_full_of_open_files_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(special, "_others_reach", lambda _path: True)
    walked = [
        ("/srv/one", FILE | 0o666),
        ("/tmp", FOLDER | 0o1777),
        ("/tmp/two", FILE | 0o666),
        ("/etc", FOLDER | 0o755),
    ]
    walked += [(f"/data/set/{number}", FILE | 0o666) for number in range(400)]
    walked += [(f"/home/user{number}/open", FOLDER | 0o777) for number in range(400)]
    monkeypatch.setattr(special, "walk", lambda: [special.Found(path, mode, 0, 0, None) for path, mode in walked])
    assert baseline.read_open() == {"/data/set": None, "/home": None, "/srv/one": 0o666, "/tmp": 0o1777}


# --- what is loaded by itself


def test_what_no_package_put_there_is_told_with_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = tmp_path / "system"
    (units / "cron.service.d").mkdir(parents=True)
    for name in ("cron.service", "left.service", "cron.service.d/left.conf"):
        (units / name).write_text("[Service]\n")
    monkeypatch.setattr(baseline, "LOADED_BY_ITSELF", (str(tmp_path), str(tmp_path / "none")))
    monkeypatch.setattr(special, "packaged_paths", lambda: frozenset({str(units), str(units / "cron.service")}))
    found = baseline.read_unpackaged(baseline.loaded_by_itself({}))
    assert list(found) == [f"{units}/cron.service.d/left.conf", f"{units}/left.service"]
    assert {files.content_of(entry) for entry in found.values()} == {b"[Service]\n"}


def test_an_older_baseline_is_no_measure_for_places_where_it_did_not_look() -> None:
    newer = {"loaded_by_itself": baseline._READERS["loaded_by_itself"]()}
    assert "/usr/lib/sysctl.d" not in baseline.loaded_by_itself({})
    assert "/usr/lib/sysctl.d" in baseline.loaded_by_itself(newer)


@pytest.mark.parametrize(
    ("unit", "is_ours"),
    [
        ("remotegpu-task-17.service", True),
        ("remotegpu-lease-end-17.timer", True),
        ("remotegpu-lease-end-17.service", True),
        ("remotegpu-firewall-rollback.timer", True),
        ("remotegpu-left.service", False),
        ("remotegpu-task-left.service", False),
        ("remotegpu-task-17.path", False),
        ("x-remotegpu-task-17.service", False),
    ],
)
def test_a_transient_unit_is_ours_by_its_whole_name(unit: str, is_ours: bool) -> None:
    assert baseline.is_own_transient(unit) is is_ours


def test_an_older_baseline_is_asked_only_of_the_packages_that_it_looked_at() -> None:
    assert "findutils" not in baseline.packages_of({})
    assert "openssh-server" in baseline.packages_of({})
    assert baseline.packages_of({"critical_packages": ["findutils"]}) == ["findutils"]


def test_a_profile_that_an_older_baseline_did_not_look_for_is_the_operators_own() -> None:
    older, newer = baseline.profiles_of({}), baseline.profiles_of({"home_profiles": [".bashrc", ".bash_aliases"]})
    assert ".bash_aliases" not in older
    assert baseline.roots_of("shell_profiles", ["/home/ops"], newer)[-1] == "/home/ops/.bash_aliases"


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("/etc/remotegpu/authorized_keys", True),
        ("/etc/remotegpu/operator_keys", True),
        ("/etc/remotegpu/enroll-token", True),
        ("/etc/remotegpu/agent.json", True),
        ("/etc/remotegpu/agent.json.bak", False),
        ("/etc/remotegpu/firewall.nft", False),
        ("/etc/remotegpu/desktop/vnc.json", False),
    ],
)
def test_of_our_own_settings_what_provisioning_alone_writes_is_compared(path: str, changes: bool) -> None:
    assert baseline.is_own_that_changes(path) is changes
    kept = baseline.own_settings_of({"own_settings": {path: {"type": "file"}}})
    assert kept == ({} if changes else {path: {"type": "file"}}), "of an older baseline as well"


# --- upgrades

ROOTS = {"type": "file", "mode": 0o644, "uid": 0, "gid": 0, "sha256": "1"}
CONFFILES = {"conffiles": {"/etc/brought": True, "/etc/changed": False, "/etc/removed": False}}


@pytest.mark.parametrize(
    ("path", "before", "now", "may_be"),
    [
        ("/etc/brought", ROOTS, ROOTS | {"sha256": "2"}, True),
        ("/etc/brought", ROOTS, ROOTS | {"sha256": "2", "mode": 0o666}, False),
        ("/etc/brought", ROOTS, ROOTS | {"mode": 0o600}, False),
        ("/etc/brought", ROOTS, None, False),
        ("/etc/brought", ROOTS, {"type": "link", "target": "/x", "uid": 0, "gid": 0}, False),
        ("/etc/changed", ROOTS, ROOTS | {"sha256": "2"}, False),
        ("/etc/elsewhere", ROOTS, ROOTS | {"sha256": "2"}, False),
        ("/etc/new", None, ROOTS, True),
        ("/etc/new", None, ROOTS | {"mode": 0o664}, False),
        ("/etc/new", None, ROOTS | {"mode": 0o4755}, False),
        ("/etc/new", None, ROOTS | {"uid": 20017}, False),
        ("/etc/new.d", None, {"type": "directory", "mode": 0o755, "uid": 0, "gid": 0}, True),
        ("/etc/removed", None, ROOTS, False),
    ],
)
def test_what_an_upgrade_may_have_made_of_a_setting(
    path: str, before: dict[str, Any] | None, now: dict[str, Any] | None, may_be: bool
) -> None:
    """Not of one that provisioning had changed or removed: an upgrade leaves that, and root among tenants does not."""
    assert baseline.may_be_brought(CONFFILES, path, before, now) is may_be
    assert not baseline.may_be_brought({}, path, before, now)


def test_the_settings_that_dpkg_lists_are_those_of_its_packages() -> None:
    digest = "0" * 32
    status = f"Package: a\nConffiles:\n /etc/a b {digest}\n /etc/old {digest} obsolete\n /etc/n newconffile\n"
    status += f"Description: of what\n /etc/no {digest}\n"
    assert packages.conffiles(status) == {"/etc/a b": digest, "/etc/old": digest}


def test_the_files_of_modules_that_no_package_answers_for_are_told_where_they_lie_at_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's own is larger than what the baseline reads of other files."""
    folder = tmp_path / "modules" / "6.1.0-9-amd64"
    (folder / "updates" / "dkms").mkdir(parents=True)
    names = ("a.ko", "b.ko.xz", "c.ko.zst", "d.ko.gz", "e.koala", "modules.dep", "packaged.ko")
    for name in names:
        (folder / "updates" / "dkms" / name).write_text(name)
    os.truncate(folder / "updates" / "dkms" / "a.ko", files._DIGEST_LIMIT_BYTES + 1)
    elsewhere = tmp_path / "elsewhere.ko"
    elsewhere.write_text("his own")
    (folder / "linked.ko").symlink_to(elsewhere)
    (folder / "gone.ko").symlink_to(tmp_path / "gone.ko")
    (folder / "build").symlink_to(tmp_path)
    monkeypatch.setattr(modules, "ROOT", str(tmp_path / "modules"))
    listing = f"{'0' * 32}  {str(folder)[1:]}/updates/dkms/packaged.ko\n"
    monkeypatch.setattr(packages, "listings", lambda kind: iter([listing] if kind == "md5sums" else []))
    built = [folder / "updates" / "dkms" / name for name in names[:4]]
    assert modules.read_unpackaged() == {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in [elsewhere, *built]
    }
    monkeypatch.setattr(modules, "ROOT", str(tmp_path / "none"))
    assert modules.read_unpackaged() == {}, "a container has none"


def test_a_file_is_as_packaged_by_its_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files_of_it = [tmp_path / name for name in ("intact", "changed", "strange")]
    for path in files_of_it:
        path.write_text("brought")
    listing = "".join(f"{special.md5(str(path))}  {str(path)[1:]}\n" for path in files_of_it[:2])
    files_of_it[1].write_text("changed")
    monkeypatch.setattr(packages, "listings", lambda kind: iter([listing] if kind == "md5sums" else []))
    assert special.as_packaged(map(str, files_of_it)) == {str(files_of_it[0])}
    assert special.answered_for(map(str, files_of_it)) == {str(path) for path in files_of_it[:2]}
