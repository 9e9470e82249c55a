"""Cleaning and verification on real hosts: a host dirtied in every way we know comes back as its baseline says."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from jsonschema import Draft7Validator

from remotegpu_agent.cleaning import STEPS
from tests.hosts.fixtures import EACH_SUITE
from tests.integration.agent.test_baseline import SCHEMA
from tests.support import dirt
from tests.support.cleaned_host import MACHINE_ID, CleanedHost, findings, leased_host, result_of
from tests.support.waiting import until

# The rental plants the same table on both suites in `make test`; the corners are told here.
pytestmark = [pytest.mark.hosts, pytest.mark.slow]


@pytest.fixture(scope="module", params=EACH_SUITE)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanedHost]:
    with leased_host(request.param, tmp_path_factory.mktemp(request.param)) as leased:
        yield leased


@pytest.fixture
def leased(shared: CleanedHost) -> Iterator[CleanedHost]:
    """A host with a tenant on it; whatever the test leaves is cleaned away."""
    shared.let_in()
    yield shared
    assert findings(shared.clean()["steps"]) == []


def valid(what: str, answer: dict[str, object]) -> dict[str, object]:
    Draft7Validator({**SCHEMA, "$ref": f"#/definitions/{what}"}).validate(answer)
    return answer


def test_a_host_dirtied_in_every_way_is_clean_again_and_the_operators_own_is_untouched(leased: CleanedHost) -> None:
    host, tenant = leased.host, leased.tenant
    his = leased.what_is_the_operators()
    dirt.plant_all(host, tenant)
    assert [way.name for way in dirt.WAYS if not way.seen(host, tenant)] == []
    marks = {way.name: way.mark(host, tenant) for way in dirt.WAYS}
    assert [name for name, mark in marks.items() if not mark] == []

    without_cleaning = leased.verify()
    cleaned = leased.clean()
    for step in cleaned["steps"]:
        print(f"{step['duration_s']:7.3f} s  {step['id']}")

    unverified = [
        way.name for way in dirt.WAYS if not dirt.is_named(without_cleaning["checks"], way.id, marks[way.name])
    ]
    assert unverified == []
    assert [way.name for way in dirt.WAYS if result_of(without_cleaning["checks"], way.id)[0] != "failed"] == []
    assert [way.name for way in dirt.WAYS if not dirt.is_named(cleaned["steps"], way.step_id, marks[way.name])] == []
    assert findings(cleaned["steps"]) == []
    assert findings(leased.verify()["checks"]) == []
    assert [way.name for way in dirt.WAYS if way.seen(host, tenant)] == []
    assert leased.what_is_the_operators() == his
    valid("clean_result", cleaned)
    valid("verify_response", without_cleaning)


def test_cleaning_again_finds_nothing_and_passes(leased: CleanedHost) -> None:
    first, second = leased.clean(), leased.clean()
    assert (first["passed"], second["passed"]) == (True, True)
    assert [step["id"] for step in second["steps"] if step["acted"]] == []


def test_a_leftover_made_immutable_from_outside_fails_by_name_and_is_not_moved_away(leased: CleanedHost) -> None:
    path = f"{leased.tenant.home}/models/kept"
    leased.host.put(path, "weights\n", owner=leased.tenant.login)
    with dirt.immutable(leased.host, path):
        cleaned = leased.clean()
        checked = leased.verify()
        assert leased.host.read(path) == "weights\n"
    assert not cleaned["passed"]
    assert result_of(cleaned["steps"], "home")[0] == "failed"
    assert path in result_of(cleaned["steps"], "owned_files")[1]
    assert path in result_of(checked["checks"], "owned_files")[1]


def test_a_set_uid_program_with_another_content_fails_by_its_name_and_is_left_to_an_operator(
    leased: CleanedHost,
) -> None:
    """The baseline holds its digest alone: it cannot be put back."""
    with dirt.replaced_program(leased.host, "/usr/bin/chfn"):
        cleaned, checked = leased.clean(), leased.verify()
    for items in (cleaned["steps"], checked["checks"]):
        result, reason = result_of(items, "special_files")
        assert (result, "/usr/bin/chfn" in reason, "another content" in reason) == ("failed", True, True)
    assert findings(leased.verify()["checks"]) == []


@pytest.mark.parametrize("program", ["find", "ss"])
def test_a_replaced_program_that_verification_looks_with_fails_by_its_name(leased: CleanedHost, program: str) -> None:
    leased.host.run(f"cp -p /usr/bin/{program} /root/kept && printf '\\n' >>/usr/bin/{program}")
    result, reason = result_of(leased.verify()["checks"], "packages")
    leased.host.run(f"cp -p /root/kept /usr/bin/{program} && rm /root/kept")
    assert (result, f"bin/{program}" in reason) == ("failed", True)
    assert result_of(leased.verify()["checks"], "packages") == ("passed", "")


A_PACKAGE_OF_AUTHORITIES = f"""
set -e
mkdir -p /root/site/DEBIAN /root/site/usr/share/ca-certificates/site
{dirt.AN_AUTHORITY} >/root/site/usr/share/ca-certificates/site/site.crt
cd /root/site
printf '%s\\n' 'Package: site-authorities' 'Version: 1' 'Architecture: all' 'Maintainer: ops <ops@example.org>' \
    'Description: the authority of a site' >DEBIAN/control
md5sum usr/share/ca-certificates/site/site.crt >DEBIAN/md5sums
dpkg-deb --root-owner-group --build . /root/site.deb
dpkg -i /root/site.deb
echo site/site.crt >>/etc/ca-certificates.conf
update-ca-certificates
"""


def test_an_authority_that_a_package_has_brought_meanwhile_is_no_tenants(leased: CleanedHost) -> None:
    """As an upgrade of ca-certificates brings some: no machine of a fleet is quarantined for it, and they stay."""
    leased.host.run(A_PACKAGE_OF_AUTHORITIES, timeout_s=60)
    cleaned = leased.clean()
    assert (findings(cleaned["steps"]), findings(leased.verify()["checks"])) == ([], [])
    trusted = "openssl verify -CAfile /etc/ssl/certs/ca-certificates.crt /usr/share/ca-certificates/site/site.crt"
    assert leased.host.run(trusted, check=False).ok
    leased.host.run("dpkg --purge site-authorities && rm -r /root/site /root/site.deb && update-ca-certificates")
    assert (leased.clean()["passed"], findings(leased.verify()["checks"])) == (True, [])


AN_UPGRADE = r"""
set -e
cp -p /var/lib/dpkg/info/passwd.md5sums /root/
cat /usr/bin/gpasswd >/root/kept # a set-uid copy would be a tenant's
printf 'another release' >>/usr/bin/gpasswd
chmod 4755 /usr/bin/gpasswd
digest=$(md5sum </usr/bin/gpasswd)
sed -i "s,^[0-9a-f]*\(  usr/bin/gpasswd\)$,${digest%% *}\1," /var/lib/dpkg/info/passwd.md5sums
"""


def test_a_set_uid_program_that_an_upgrade_has_brought_is_no_tenants(leased: CleanedHost) -> None:
    """Security upgrades go on under a lease. One that its package does not vouch for fails by its name."""
    leased.host.run(AN_UPGRADE)
    upgraded, seen = leased.clean(), leased.verify()
    leased.host.run("cp -p /root/passwd.md5sums /var/lib/dpkg/info/")
    changed, found = leased.clean(), leased.verify()
    leased.host.run(
        "cat /root/kept >/usr/bin/gpasswd && chmod 4755 /usr/bin/gpasswd && rm /root/kept /root/passwd.md5sums"
    )
    assert (findings(upgraded["steps"]), findings(seen["checks"])) == ([], [])
    for items in (changed["steps"], found["checks"]):
        result, reason = result_of(items, "special_files")
        assert (result, "/usr/bin/gpasswd" in reason) == ("failed", True)
    assert findings(leased.verify()["checks"]) == []


A_RELEASE = r"""
set -e
mkdir -p /root/site/DEBIAN /root/site/etc/site.d
cd /root/site
printf '# new\n' >etc/site.d/site.conf
echo /etc/site.d/site.conf >DEBIAN/conffiles
printf '%s\n' 'Package: site' 'Version: 1' 'Architecture: all' 'Maintainer: ops <ops@example.org>' \
    'Description: settings of a site' >DEBIAN/control
dpkg-deb --root-owner-group --build . /root/site.deb
dpkg -i /root/site.deb
cp -p /etc/adduser.conf /var/lib/dpkg/status /root/
printf '# another release\n' >>/etc/adduser.conf
digest=$(md5sum </etc/adduser.conf)
sed -i "s,^\( /etc/adduser.conf\) .*,\1 ${digest%% *}," /var/lib/dpkg/status
cp -p /usr/sbin/sshd /usr/sbin/sshd.new && mv /usr/sbin/sshd.new /usr/sbin/sshd
"""


def test_what_an_upgrade_has_brought_is_no_tenants_and_stays(leased: CleanedHost) -> None:
    """Settings that its package vouches for, in folders of its own, and a daemon that was not started again."""
    host = leased.host
    host.run(A_RELEASE, timeout_s=60)
    assert "sshd (deleted)" in host.run("readlink /proc/[0-9]*/exe", check=False).stdout
    cleaned, seen = leased.clean(), leased.verify()
    assert (findings(cleaned["steps"]), findings(seen["checks"])) == ([], [])
    assert (host.read("/etc/site.d/site.conf"), "another release" in host.read("/etc/adduser.conf")) == (
        "# new\n",
        True,
    )
    host.run("cp -p /root/status /var/lib/dpkg/status && rm /root/status && printf '# left\n' >/etc/site.d/site.conf")
    assert findings(leased.clean()["steps"]) == []
    assert host.run("cmp /etc/adduser.conf /root/adduser.conf", check=False).ok
    assert not host.run("test -e /etc/site.d/site.conf", check=False).ok
    host.run("dpkg --purge site; rm -rf /root/site /root/site.deb /root/adduser.conf; systemctl restart ssh")
    assert findings(leased.verify()["checks"]) == []


def test_a_packaged_authority_that_was_replaced_fails_by_its_name_and_is_left_to_an_operator(
    leased: CleanedHost,
) -> None:
    """The baseline has no content of it: it cannot be put back."""
    path = "/usr/share/ca-certificates/mozilla/ISRG_Root_X1.crt"
    leased.host.run(f"cp -p {path} /root/kept && {dirt.AN_AUTHORITY} >{path} && update-ca-certificates --fresh")
    cleaned, checked = leased.clean(), leased.verify()
    leased.host.run(f"cp -p /root/kept {path} && rm /root/kept && update-ca-certificates --fresh")
    for items in (cleaned["steps"], checked["checks"]):
        result, reason = result_of(items, "etc")
        assert (result, "/etc/ssl/certs/ISRG_Root_X1.pem trusts a certificate" in reason) == ("failed", True)
    assert path in result_of(checked["checks"], "packages")[1]
    assert findings(leased.verify()["checks"]) == []


def test_a_listener_without_a_process_fails_by_its_port(leased: CleanedHost) -> None:
    with dirt.hidden_listener(leased.host, 31340):
        cleaned, checked = leased.clean(), leased.verify()
    for items, name in ((cleaned["steps"], "listening_ports"), (checked["checks"], "listening_ports")):
        result, reason = result_of(items, name)
        assert (result, "31340" in reason, "no process that can be seen" in reason) == ("failed", True, True)
    assert leased.clean()["passed"]


def test_a_port_can_be_open_from_outside_while_the_host_itself_sees_nothing(leased: CleanedHost) -> None:
    address = leased.host.address
    assert not dirt.is_open(address, 31341)
    with dirt.port_open_from_outside(leased.host, 31341):
        until(lambda: dirt.is_open(address, 31341), "the port to be open from outside", timeout_s=10)
        assert leased.clean()["passed"]
        assert dirt.is_open(address, 31341)
    assert not dirt.is_open(address, 31341)


def test_a_stranger_who_holds_a_gpu_is_named_and_not_killed(leased: CleanedHost) -> None:
    leased.host.run("touch /dev/nvidia-test; setsid -f sleep 70001 </dev/nvidia-test >/dev/null 2>&1")
    pid = leased.host.run("pgrep -n -f 'sleep 70001'").stdout.strip()
    cleaned, checked = leased.clean(), leased.verify()
    for result, reason in (result_of(cleaned["steps"], "gpu_holders"), result_of(checked["checks"], "gpu_holders")):
        assert (result, f"process {pid} " in reason) == ("failed", True)
    leased.host.run(["kill", pid])
    until(lambda: not leased.host.run(["test", "-d", f"/proc/{pid}"], check=False).ok, "the holder to be gone")


def test_gpu_memory_that_nobody_seems_to_use_fails_by_the_card_and_so_does_a_card_that_does_not_tell(
    leased: CleanedHost,
) -> None:
    idle = leased.host.gpu.scenario
    assert result_of(leased.verify()["checks"], "gpu_memory") == ("passed", "")
    told = {
        f"2048 MiB of GPU 1 ({idle.uuids[1]}) are in use": idle.having("gpu1", memory_used=str(2 << 30)),
        f"GPU 1 ({idle.uuids[1]}) does not tell": idle.having(
            "gpu1", compute_processes="!UNKNOWN", memory_used="!UNKNOWN"
        ),
        "the driver tells of no GPU (mismatch)": idle.mismatch(),
    }
    try:
        for text, scenario in told.items():
            leased.host.gpu.show(scenario)
            result, reason = result_of(leased.verify()["checks"], "gpu_memory")
            assert (result, text in reason) == ("failed", True), reason
    finally:
        leased.host.gpu.show(idle)


def test_a_container_of_nobody_known_survives_and_is_named(leased: CleanedHost) -> None:
    leased.host.run("docker run -d --name stranger kept:image $(command -v sleep) 70002")
    cleaned, checked = leased.clean(), leased.verify()
    assert leased.host.run("docker inspect --format '{{.State.Running}}' stranger").stdout.strip() == "true"
    for result, reason in (result_of(cleaned["steps"], "containers"), result_of(checked["checks"], "containers")):
        assert (result, "stranger" in reason) == ("failed", True)
    leased.host.run("docker rm -f stranger")


def test_an_operator_cleans_from_the_hosts_own_shell(leased: CleanedHost) -> None:
    """`remotegpu-agent clean`, with the portal away: the same order, the same refusals, and words for a person."""
    host, path = leased.host, f"{leased.tenant.home}/kept"
    ordered = leased.order()
    host.put("/root/order.json", json.dumps(ordered), mode="0600")
    host.put("/root/other.json", json.dumps(ordered | {"machine_id": MACHINE_ID + 1}), mode="0600")
    clean = "remotegpu-agent clean --request /root/"
    assert "not enrolled" in host.run(f"{clean}order.json", check=False).stderr
    credential = {"machine_id": MACHINE_ID, "credential_id": 1, "credential": "of this host"}
    host.put("/var/lib/remotegpu-agent/credential.json", json.dumps(credential), mode="0600")
    refused = host.run(f"{clean}other.json", check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "remotegpu-agent: not cleaned: the order is for machine 2, this is machine 1\n"

    host.put(path, "weights\n", owner=leased.tenant.login)
    with dirt.immutable(host, path):
        failed = host.run(f"{clean}order.json", check=False)
    assert (failed.returncode, json.loads(failed.stdout)["passed"]) == (1, False)
    assert f"FAILED home: {leased.tenant.home}" in failed.stderr
    assert "What is named above is still there; run it again" in failed.stderr
    cleaned = host.run(f"{clean}order.json")
    valid("clean_result", json.loads(cleaned.stdout))
    assert cleaned.stderr == f"clean: nothing of the lease is left ({len(STEPS)} steps)\n"
    assert host.run(["id", leased.tenant.login], check=False).returncode == 1
    assert not host.run(["test", "-e", leased.tenant.home], check=False).ok
    assert "lease.cleaned" in host.read("/var/lib/remotegpu-agent/journal.jsonl")


def test_nothing_is_touched_while_another_lease_is_open(leased: CleanedHost) -> None:
    leased.host.put(f"{leased.tenant.home}/work", "mine\n", owner=leased.tenant.login)
    leased.host.run("useradd --uid 20018 --create-home --groups remotegpu-leases lease18")
    leased.host.put("/etc/remotegpu/authorized_keys/lease18", "ssh-ed25519 AAAA\n")
    answer = leased.clean()
    assert "lease18 is open" in answer["refused"]
    assert leased.host.read(f"{leased.tenant.home}/work") == "mine\n"
    leased.host.run("chage --expiredate 0 lease18")


@pytest.mark.parametrize("changed", [{"login": "ops"}, {"login": "lease18", "uid": 1000}, {"uid": 20099}])
def test_an_order_that_does_not_fit_the_host_is_refused(leased: CleanedHost, changed: dict[str, object]) -> None:
    assert "refused" in leased.clean(**changed)
    assert leased.host.run(["test", "-d", leased.tenant.home], check=False).ok


def test_a_link_planted_by_the_tenant_is_removed_and_not_followed(leased: CleanedHost) -> None:
    leased.host.put("/home/ops/precious", "his\n", owner="ops")
    leased.host.run("ln -s /home/ops /tmp/door; ln -s /home/ops/precious ~/precious", user=leased.tenant.login)
    assert findings(leased.clean()["steps"]) == []
    assert leased.host.read("/home/ops/precious") == "his\n"
    leased.host.run("rm /home/ops/precious")


def test_what_an_operator_shared_with_the_tenants_group_stays_his(leased: CleanedHost) -> None:
    leased.host.run(f"install -d -g {leased.tenant.login} -m 2770 /srv/shared && echo his >/srv/shared/file")
    assert findings(leased.clean()["steps"]) == []
    assert leased.host.run("cat /srv/shared/file; stat -c %g /srv/shared").stdout.split() == ["his", "0"]
    leased.host.run("rm -r /srv/shared")


def test_a_fork_bomb_is_outrun(leased: CleanedHost) -> None:
    bomb = "import os\nwhile True:\n  if os.fork(): os._exit(0)\n"
    leased.host.put("/tmp/bomb.py", bomb)
    leased.host.run(
        "for i in 1 2; do setsid -f nice python3 /tmp/bomb.py >/dev/null 2>&1; done", user=leased.tenant.login
    )
    assert result_of(leased.clean()["steps"], "processes") == ("passed", "")
    leased.host.run("rm /tmp/bomb.py")


GROUND = r"""
import os
os.chdir(os.path.expanduser("~"))
os.mkdir("flat")
for number in range(8000):
    os.close(os.open(f"flat/{number:0100}", os.O_CREAT | os.O_WRONLY))
for top in ("/tmp", "/var/tmp", "."):
    folder = os.open(top, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d" * 200, dir_fd=folder)
        folder, before = os.open("d" * 200, os.O_RDONLY, dir_fd=folder), folder
        os.close(before)
    os.close(folder)
    for name in (b"-rf", b"a\nb", b"\xff\xfe", b"x" * 255, b"*", b"$(id)", b" "):
        os.close(os.open(os.fsencode(top) + b"/" + name, os.O_CREAT | os.O_WRONLY))
for number in range(20):
    file = os.open(f"sparse{number}", os.O_CREAT | os.O_WRONLY)
    os.ftruncate(file, 60 << 20)
    os.fchmod(file, 0o6755)
    os.close(file)
os.symlink("/etc", ".config")
os.makedirs(".local/share")
os.symlink("/", ".local/share/systemd")
"""


def test_ground_that_a_tenant_has_prepared_is_cleaned_like_any_other(leased: CleanedHost) -> None:
    """Trees deeper than any path, thousands of names in one folder, names that are options or commands, links in place
    of folders that root reads: none of it leads anywhere, and none of it makes cleaning fail.
    """
    his = leased.what_is_the_operators()
    leased.host.run(["python3", "-c", GROUND], user=leased.tenant.login, timeout_s=120)
    cleaned = leased.clean()
    assert findings(cleaned["steps"]) == []
    assert findings(leased.verify()["checks"]) == []
    assert leased.what_is_the_operators() == his
    valid("clean_result", cleaned)


def test_a_tenant_with_as_many_processes_as_are_allowed_is_killed_at_once(leased: CleanedHost) -> None:
    """As a user over the limit nothing can be executed any more, not even what shall kill it."""
    start = "for i in 1 2 3 4 5; do setsid -f sleep 70003 >/dev/null 2>&1; done"
    leased.host.run(start, user=leased.tenant.login)
    kill = "import sys; sys.path.insert(0, '/opt/remotegpu/source'); sys.dont_write_bytecode = True\n"
    kill += f"from remotegpu_agent import killing; killing.kill_at_once({leased.tenant.uid})"
    leased.host.run(["prlimit", "--nproc=3", "python3", "-I", "-c", kill])
    assert leased.host.run(["pgrep", "-u", leased.tenant.login], check=False).stdout == ""
