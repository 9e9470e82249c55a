"""House rules of the roles: what nobody should have to remember in a review."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from portal.services import runs

ROOT = Path(__file__).parents[2]
ROLES = sorted(path for path in (ROOT / "roles").iterdir() if path.is_dir())
GPU_HOST_PLAYS = (
    ("gpu_hosts", ("base", "ssh_hardening", "unattended_upgrades", "firewall", "docker", "node_exporter")),
    ("with_nvidia_gpus", ("nvidia_driver", "nvidia_container_toolkit", "nvidia_gpu_exporter")),
    ("with_desktop_vnc", ("desktop_vnc",)),
    ("with_desktop_xrdp", ("desktop_xrdp",)),
    ("gpu_hosts", ("gpu_agent",)),
)
GPU_HOST_ROLES = tuple(role for _, roles in GPU_HOST_PLAYS for role in roles)
TYPES: dict[str, type] = {
    "bool": bool,
    "dict": dict,
    "float": float,
    "int": int,
    "list": list,
    "path": str,
    "str": str,
}
every_role = pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) if path.exists() else None


def tasks_of(role: Path) -> Iterator[dict[str, Any]]:
    """Every task and handler of a role, those inside blocks included."""
    for path in sorted((*role.glob("tasks/*.yml"), *role.glob("handlers/*.yml"))):
        yield from flatten(read(path) or [])


def flatten(tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        yield task
        for part in ("block", "rescue", "always"):
            yield from flatten(task.get(part, []))


def words(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def rendered_defaults(role: Path) -> dict[str, Any]:
    """The defaults as a host without a portal sees them."""
    loader = DataLoader()
    defaults: dict[str, Any] = loader.load_from_file(str(role / "defaults/main.yml"), trusted_as_template=True)
    variables = {**defaults, "role_path": str(role)}
    return {name: Templar(loader, variables=variables).template(value) for name, value in defaults.items()}


@every_role
def test_the_specification_knows_every_default_and_no_other(role: Path) -> None:
    specified = read(role / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    assert set(specified) == set(read(role / "defaults/main.yml"))


@every_role
def test_a_default_has_the_type_that_the_specification_says(role: Path) -> None:
    specified = read(role / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    for name, value in rendered_defaults(role).items():
        option = specified[name]
        fits = isinstance(value, TYPES[option["type"]]) and (option["type"] == "bool") == isinstance(value, bool)
        assert fits, f"{name} is {value!r}, and the specification says {option['type']}"
        assert option.get("description"), f"{name} has no description"
        assert "default" not in option, f"{name}: the value is said once, in defaults/main.yml"
        if "choices" in option:
            assert value in option["choices"], f"{name} is {value!r}"


@every_role
def test_public_names_carry_the_role_and_every_default_its_reason(role: Path) -> None:
    lines = (role / "defaults/main.yml").read_text().splitlines()
    for name in read(role / "defaults/main.yml"):
        assert name.startswith(f"{role.name}_")
        above = lines[[line.split(":")[0] for line in lines].index(name) - 1]
        paired = above.split(":")[0] in read(role / "defaults/main.yml")
        assert above.startswith("#") or paired, f"{name} says nothing about itself"


@every_role
def test_every_notify_has_its_handler(role: Path) -> None:
    handlers = read(role / "handlers/main.yml") or []
    topics = {topic for handler in handlers for topic in words(handler.get("listen"))}
    notified = {topic for task in tasks_of(role) for topic in words(task.get("notify"))}
    assert notified <= topics, "a wrong name shows only when the task first changes something"
    assert topics <= notified, "nobody calls it"
    title = role.name.replace("_", " ").capitalize()
    for handler in handlers:
        assert handler["name"].startswith(f"{title} | "), handler["name"]


@every_role
def test_a_role_asks_before_it_acts(role: Path) -> None:
    first = read(role / "tasks/main.yml")[0]
    assert first["ansible.builtin.import_tasks"] == "assert.yml"
    assert first["tags"] == "always"
    for task in flatten(read(role / "tasks/assert.yml")):
        asserts = task.get("ansible.builtin.assert")
        if asserts is not None:
            assert len(asserts["fail_msg"]) > 60, f"{task['name']}: what is wrong, where to set it, an example"


def test_the_guide_names_the_roles_that_refuse_ubuntu_22_04() -> None:
    known = {role.name: (read(role / "vars/main.yml") or {}).get(f"__{role.name}_supported") for role in ROLES}
    refusing = {name for name, supported in known.items() if supported and "Ubuntu_22" not in supported}
    guide = (ROOT / "docs/operator.md").read_text()
    told = re.search(r"^Ubuntu 22.04 is for .*?refuse it", guide, re.MULTILINE | re.DOTALL)
    assert told is not None
    assert {word for word in re.findall(r"`(\w+)`", told.group()) if (ROOT / "roles" / word).exists()} == refusing


def test_a_switch_that_the_guide_gives_on_the_command_line_may_come_as_a_word() -> None:
    """`-e name=true` is a string, which no condition takes, and `-e name=false` would be a yes."""
    guides = [*ROOT.glob("docs/*.md"), *ROOT.glob("roles/*/README.md")]
    told = {name for guide in guides for name in re.findall(r"-e (\w+)=(?:true|false)", guide.read_text())}
    assert "portal_rollback" in told
    for task in (task for role in ROLES for task in tasks_of(role)):
        asked = [*map(str, words(task.get("when"))), *re.findall(r"{{.*?}}", str(task))]
        raw = [text for text in asked if re.search(rf"\b({'|'.join(told)})\b(?! *[|] *bool)", text)]
        assert raw == [], task["name"]


@every_role
def test_packages_come_in_one_call_that_waits_for_the_lock(role: Path) -> None:
    for task in tasks_of(role):
        module = task.get("ansible.builtin.apt")
        if module is None:
            continue
        assert "loop" not in task, task["name"]
        assert "lock_timeout" in module, f"{task['name']}: unattended upgrades hold the lock"


@every_role
def test_nothing_that_debian_13_has_lost_or_that_flushes_what_is_not_ours(role: Path) -> None:
    for path in role.rglob("*"):
        if path.suffix in {".yml", ".j2"}:
            code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
            assert not re.search(r"apt_key|apt_repository|ignore_errors|flush ruleset", code), path


@pytest.mark.parametrize("name", GPU_HOST_ROLES)
def test_no_mark_says_that_a_task_has_run_before(name: str) -> None:
    """What is there decides, not what was done once: a host that was changed by hand is mended."""
    for task in tasks_of(ROOT / "roles" / name):
        arguments = [task.get(f"ansible.builtin.{module}") for module in ("command", "shell", "script")]
        given = [task.get("args"), *arguments]
        assert not any(isinstance(each, dict) and "creates" in each for each in given), task["name"]


@every_role
def test_secrets_stay_out_of_output_and_diffs(role: Path) -> None:
    for task in tasks_of(role):
        arguments = yaml.safe_dump([task.get(name) for name in task if name.startswith("ansible.builtin.")])
        if re.search(r"_token\b", arguments):
            assert task.get("no_log") is True, task["name"]
            assert task.get("diff") is False, task["name"]


def test_no_secret_is_in_a_tasks_environment() -> None:
    """sudo writes it into the host's journal with the command, whatever no_log says."""
    plays = [play for path in sorted((ROOT / "playbooks").glob("*.yml")) for play in read(path)]
    tasks = [task for role in ROLES for task in tasks_of(role)]
    tasks += [
        task for play in plays for part in ("pre_tasks", "tasks", "post_tasks") for task in flatten(play.get(part, []))
    ]
    told = {each["name"]: str(each["environment"]) for each in (*plays, *tasks) if "environment" in each}
    assert len(told) > 3
    assert {
        name for name, said in told.items() if re.search(r"(?i)password\b|passphrase|secret|token|_key\b", said)
    } == set()


@pytest.mark.parametrize("name", GPU_HOST_ROLES)
def test_a_file_that_not_everybody_may_read_is_in_no_diff(name: str) -> None:
    """A look for drift shows differences: also of a file whose secret only one site puts there."""
    for task in tasks_of(ROOT / "roles" / name):
        for module in ("copy", "template"):
            mode = str((task.get(f"ansible.builtin.{module}") or {}).get("mode", ""))
            if re.fullmatch("0[0-7]{3}", mode) and not int(mode, 8) & 0o004:
                assert task.get("diff") is False or task.get("no_log") is True, task["name"]


@every_role
def test_a_readme_can_be_read_in_a_minute(role: Path) -> None:
    assert len((role / "README.md").read_text().splitlines()) <= 40


def test_the_playbook_runs_each_role_under_its_own_tag_and_those_of_cards_where_cards_are() -> None:
    plays = read(ROOT / "playbooks/gpu_hosts.yml")
    for key in ("role", "tags"):
        assert tuple((play["hosts"], tuple(entry[key] for entry in play["roles"])) for play in plays) == GPU_HOST_PLAYS
    assert set(GPU_HOST_ROLES) == runs.ROLES, "the portal runs the playbook by the same tags"


@pytest.mark.parametrize("name", GPU_HOST_ROLES)
def test_a_scenario_tries_the_role(name: str) -> None:
    for file in ("molecule.yml", "converge.yml", "verify.yml"):
        assert (ROOT / "molecule" / name / file).exists()


def test_what_disrupts_a_lease_waits_for_maintenance() -> None:
    ours = ("desktop", "docker", "firewall", "gpu_agent", "node_exporter", "ssh_hardening")
    for name in (*ours, "nvidia_driver", "nvidia_container_toolkit", "nvidia_gpu_exporter"):
        loader = DataLoader()
        path = ROOT / "roles" / name / "defaults/main.yml"
        rule = loader.load_from_file(str(path), trusted_as_template=True)[f"{name}_disruption_allowed"]
        answers = {
            (leased, maintained): Templar(
                loader, variables={"remotegpu_lease_active": leased, "remotegpu_maintenance": maintained}
            ).template(rule)
            for leased in (False, True)
            for maintained in (False, True)
        }
        assert answers == {(False, False): True, (False, True): True, (True, False): False, (True, True): True}
        assert Templar(loader, variables={}).template(rule) is True


def test_a_reboot_under_a_lease_takes_a_word_of_its_own() -> None:
    """Maintenance is what keeps the next lease away while the host is drained, so it cannot be that word."""
    assert read(ROOT / "roles/reboot/defaults/main.yml")["reboot_disruption_allowed"] is False


@pytest.mark.parametrize(
    ("allow", "expected"),
    [
        ([], []),
        ([{"port": 9100}], ["tcp dport 9100 accept"]),
        (
            [{"port": 53, "protocol": "udp", "sources": ["192.0.2.1", "2001:db8::/64"], "comment": "names"}],
            [
                'ip saddr { 192.0.2.1 } udp dport 53 accept comment "names"',
                'ip6 saddr { 2001:db8::/64 } udp dport 53 accept comment "names"',
            ],
        ),
    ],
)
def test_the_ruleset_opens_ssh_and_what_is_said(allow: list[dict[str, Any]], expected: list[str]) -> None:
    loader = DataLoader()
    variables = {
        "firewall_allow": allow,
        "firewall_container_interfaces": ["docker0"],
        "firewall_gateway": False,
        "firewall_log": False,
        "ansible_managed": "managed",
        "__firewall_mark": "0x1",
        "__firewall_ssh": [22, 2222],
    }
    folder = str(ROOT / "roles/firewall/templates")
    template = loader.get_text_file_contents(f"{folder}/firewall.nft.j2")
    templar = Templar(loader, variables=variables).copy_with_new_env(searchpath=[folder])
    text = str(templar.template(trust_as_template(template)))
    lines = [line.strip() for line in text.splitlines()]
    assert 'tcp dport { 22, 2222 } accept comment "SSH"' in lines
    assert [line for line in lines if "dport 9100" in line or "dport 53" in line] == expected
    assert [line for line in lines if "policy drop" in line] == [
        "type filter hook input priority filter; policy drop;",
        "type filter hook forward priority filter - 10; policy drop;",
    ]
