"""The driver's role where no test host runs, and what it reads off a host without asking the driver."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.rendering import load_module
from tests.support.rendering import DISTRIBUTIONS, FACTS, evaluate, render

ROLE = Path(__file__).parents[2] / "roles/nvidia_driver"
FAKE_ROOT = Path(__file__).parents[2] / "molecule/nvidia_driver/files/root"
H100, H100_HGX, PASCAL, BLACKWELL = "10de:2330", "10de:2330", "10de:1b38", "10de:2901"
NVIDIA: dict[str, Any] = {"nvidia_driver_source": "nvidia"}
KERNEL, NEXT = "6.8.0-60-generic", "6.8.0-101-generic"
nvidia_facts = load_module("nvidia_driver", "nvidia_facts")


def host(*devices: str, **changes: Any) -> dict[str, Any]:
    """The fact `nvidia` of a host with these cards, as the module makes it of them."""
    gpus = [{"address": f"0000:{number:02x}:00.0", "device": device} for number, device in enumerate(devices)]
    return {
        "gpus": gpus,
        "nvswitches": 0,
        "switch_managers": 0,
        "without_infiniband": [],
        "open_possible": all(nvidia_facts.generation(gpu) >= nvidia_facts.TURING for gpu in gpus),
        "open_required": any(nvidia_facts.generation(gpu) >= nvidia_facts.BLACKWELL for gpu in gpus),
        "loaded": None,
        "on_disk": None,
        "next_on_disk": changes.get("on_disk"),
        "has_programs": False,
        "nouveau_loaded": False,
        "secure_boot": None,
        "kernel": KERNEL,
        "next_kernel": KERNEL,
        "headers": True,
        **changes,
    }


def says(expression: str, suite: str, nvidia: dict[str, Any] | None = None, **given: Any) -> Any:
    return told("{{ " + expression + " }}", suite, nvidia, **given)


def told(text: str, suite: str, nvidia: dict[str, Any] | None = None, **given: Any) -> Any:
    distribution, major = DISTRIBUTIONS[suite]
    facts = {**FACTS, "distribution": distribution, "distribution_major_version": major, "architecture": "x86_64"}
    facts["nvidia"] = nvidia or host(H100)
    nothing = {"stdout": ""}
    asked = {
        "__nvidia_driver_dpkg": nothing,
        "__nvidia_driver_madison": nothing,
        "__nvidia_driver_release": "580.95.05",
    }
    given = {**asked, **given}
    return evaluate(text, "nvidia_driver", suite, ansible_facts=facts, **given)


def refusal(name: str) -> tuple[str, str]:
    """What has to hold, and what is told where it does not."""
    (task,) = [task for task in yaml.safe_load((ROLE / "tasks/ask.yml").read_text()) if task["name"] == name]
    asked = task["ansible.builtin.assert"]
    return asked["that"], asked["fail_msg"]


# -- which packages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "given", "card", "expected"),
    [
        ("bookworm", {}, H100, "nvidia-open-kernel-dkms"),
        ("bookworm", {}, PASCAL, "nvidia-kernel-dkms"),
        ("trixie", {"nvidia_driver_modules": "proprietary"}, H100, "nvidia-kernel-dkms"),
        ("noble", {}, H100, "nvidia-utils-580-server"),
        ("jammy", {"nvidia_driver_branch": "570"}, H100, "nvidia-utils-570-server"),
        ("bookworm", {"nvidia_driver_source": "nvidia"}, H100, "nvidia-open-580"),
        ("bookworm", {"nvidia_driver_source": "nvidia"}, PASCAL, "cuda-drivers-580"),
        ("noble", {"nvidia_driver_source": "nvidia", "nvidia_driver_branch": "595"}, H100, "nvidia-open"),
    ],
)
def test_the_release_is_that_of_the_package_which_carries_the_driver(
    suite: str, given: dict[str, Any], card: str, expected: str
) -> None:
    assert says("__nvidia_driver_release_package", suite, host(card), **given) == expected


@pytest.mark.parametrize("suite", ["jammy", "noble"])
def test_ubuntu_takes_modules_that_are_signed_and_builds_none(suite: str) -> None:
    names = says("__nvidia_driver_apt_names", suite, __nvidia_driver_release="580.95.05")
    assert "linux-modules-nvidia-580-server-open-generic" in names
    assert "nvidia-headless-no-dkms-580-server-open=580.95.05-*" in names
    assert not any("dkms" in name and "no-dkms" not in name for name in names)
    assert says("__nvidia_driver_built_here", suite) is False


@pytest.mark.parametrize("suite", ["jammy", "noble"])
@pytest.mark.parametrize(
    ("kernels", "named"),
    [
        ({"on_disk": "580.95.05"}, []),
        ({"on_disk": "580.95.05", "next_kernel": NEXT, "next_on_disk": "580.95.05"}, []),
        ({"on_disk": "580.95.05", "next_kernel": NEXT, "next_on_disk": None}, [NEXT]),
        ({"next_kernel": NEXT, "next_on_disk": "580.95.05"}, [KERNEL]),
        ({}, [KERNEL]),
    ],
)
def test_ubuntu_takes_modules_for_the_kernels_that_the_held_package_does_not_know(
    suite: str, kernels: dict[str, Any], named: list[str]
) -> None:
    offered = {
        "stdout": "\n".join(
            f" linux-modules-nvidia-580-server-open-{kernel} | {kernel[:-8]}.1 | http://archive restricted"
            for kernel in (KERNEL, NEXT)
        )
    }
    held = {"stdout": "hi  linux-modules-nvidia-580-server-open-generic 6.8.0-60.63\n"}
    given = {"__nvidia_driver_madison": offered, "__nvidia_driver_dpkg": held}
    names = says("__nvidia_driver_apt_names", suite, host(H100, **kernels), **given)
    modules = [name for name in names if name.startswith("linux-modules")]
    assert modules == [f"linux-modules-nvidia-580-server-open-{kernel}" for kernel in named]
    leased = says(
        "__nvidia_driver_missing", suite, host(H100, **kernels), **given, nvidia_driver_disruption_allowed=False
    )
    assert not any(name.startswith("linux-modules") for name in leased), "it can wait for the lease to end"


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
@pytest.mark.parametrize("given", [{}, {"nvidia_driver_prebuilt": False}, {"nvidia_driver_source": "nvidia"}])
def test_a_kernels_own_modules_are_asked_for_where_ubuntu_has_them_and_taken_where_apt_does(
    suite: str, given: dict[str, Any]
) -> None:
    asked = says("__nvidia_driver_prebuilt_modules", suite, **given)
    has_them = DISTRIBUTIONS[suite][0] == "Ubuntu" and given == {}
    assert asked == ([f"linux-modules-nvidia-580-server-open-{KERNEL}"] if has_them else [])
    assert not set(asked) & set(says("__nvidia_driver_plain", suite, **given)), "apt has none"


@pytest.mark.parametrize("suite", ["jammy", "noble"])
def test_ubuntu_builds_modules_where_it_is_told_to(suite: str) -> None:
    names = says(
        "__nvidia_driver_apt_names",
        suite,
        host(PASCAL, headers=False),
        __nvidia_driver_release="580.95.05",
        nvidia_driver_prebuilt=False,
    )
    assert "nvidia-headless-580-server=580.95.05-*" in names
    assert {"linux-headers-generic", "linux-headers-6.8.0-60-generic"} <= set(names)


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
@pytest.mark.parametrize("source", ["distribution", "nvidia"])
def test_everything_of_a_release_is_asked_for_in_one_step(suite: str, source: str) -> None:
    if (DISTRIBUTIONS[suite][0], source) == ("Debian", "distribution"):
        assert says("__nvidia_driver_fabric_manager", suite, nvidia_driver_source=source) == ""
        return
    names = says(
        "__nvidia_driver_apt_names",
        suite,
        host(H100_HGX, nvswitches=4),
        nvidia_driver_source=source,
        __nvidia_driver_release="580.95.05",
    )
    branch = "-580" if source == "distribution" else ""  # NVIDIA has none in this name from 580 on
    assert f"nvidia-fabricmanager{branch}=580.95.05-*" in names
    assert not {"nvlsm", "infiniband-diags"} & {name.partition("=")[0] for name in names}, (
        "these switches are on the bus"
    )


@pytest.mark.parametrize(
    ("branch", "driver", "fabric_manager"),
    [
        ("570", "nvidia-open-570", "nvidia-fabricmanager-570"),
        ("580", "nvidia-open-580", "nvidia-fabricmanager"),
        ("595", "nvidia-open", "nvidia-fabricmanager"),
    ],
)
def test_nvidias_repository_names_its_packages_by_the_branch(branch: str, driver: str, fabric_manager: str) -> None:
    names = says("__nvidia_driver_exact", "noble", host(H100_HGX, nvswitches=4), **NVIDIA, nvidia_driver_branch=branch)
    assert names == [driver, fabric_manager]


# -- a board with NVLink 5 -------------------------------------------------------------------------------------------

MANAGED = {"stdout": " nvlsm | 2025.10.14-1 | https://m  Packages\n nvlsm | 2025.06.11-1 | https://m  Packages\n"}
EXTRA = f"linux-modules-extra-{KERNEL}"


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_a_board_with_nvlink_5_gets_what_manages_its_switches(suite: str) -> None:
    board = host(*[BLACKWELL] * 8, switch_managers=4)
    names = says("__nvidia_driver_apt_names", suite, board, **NVIDIA, __nvidia_driver_madison=MANAGED)
    assert {"nvidia-fabricmanager=580.95.05-*", "nvlsm=2025.10.14-1", "infiniband-diags", "libibumad3"} <= set(names)


@pytest.mark.parametrize(
    ("release", "there", "asked"),
    [
        ("580.95.05", "hi  nvlsm 2025.06.11-1\n", []),
        ("580.95.05", "", ["nvlsm=2025.10.14-1"]),
        ("580.126.20", "hi  nvlsm 2025.06.11-1\n", ["nvlsm=2025.10.14-1"]),
    ],
)
def test_it_moves_with_the_driver_and_stays_with_it(release: str, there: str, asked: list[str]) -> None:
    dpkg = "".join(
        f"hi  {name} 580.95.05-1\n" for name in ("nvidia-open-580", "nvidia-fabricmanager", "nvidia-persistenced")
    )
    given = {"__nvidia_driver_dpkg": {"stdout": dpkg + there}, "__nvidia_driver_madison": MANAGED, **NVIDIA}
    board = host(BLACKWELL, switch_managers=4)
    names = says("__nvidia_driver_apt_names", "trixie", board, **given, __nvidia_driver_release=release)
    assert [name for name in names if "nvlsm" in name] == asked
    assert ("nvlsm" in says("__nvidia_driver_missing", "trixie", board, **given)) is (there == "")


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("source", "board", "possible"),
    [
        ("distribution", {"switch_managers": 4}, []),
        ("distribution", {"nvswitches": 4}, ["jammy", "noble"]),
        ("distribution", {}, [*DISTRIBUTIONS]),
        ("nvidia", {"switch_managers": 4}, [*DISTRIBUTIONS]),
        ("nvidia", {"nvswitches": 4}, [*DISTRIBUTIONS]),
    ],
)
def test_a_board_is_refused_where_nobody_would_manage_its_switches(
    suite: str, source: str, board: dict[str, int], possible: list[str]
) -> None:
    holds, message = refusal("Refuse an HGX board without a fabric manager")
    seen = host(BLACKWELL, **board)
    assert says(holds, suite, seen, nvidia_driver_source=source) is (suite in possible)
    sentence = told(message, suite, seen, nvidia_driver_source=source)
    assert "Set nvidia_driver_source: nvidia." in sentence
    assert ("nvlsm" in sentence) is ("switch_managers" in board)


@pytest.mark.parametrize(
    ("suite", "offered", "taken", "unreachable"),
    [
        ("noble", True, [EXTRA], []),
        ("noble", False, [], [KERNEL]),
        ("trixie", False, [], [KERNEL]),
    ],
)
def test_a_kernel_without_the_way_to_the_switches_gets_it_where_apt_has_it(
    suite: str, offered: bool, taken: list[str], unreachable: list[str]
) -> None:
    madison = {"stdout": f" {EXTRA} | 6.8.0-60.63 | http://archive noble/main\n" * offered}
    given = {**NVIDIA, "__nvidia_driver_madison": madison}
    board = host(BLACKWELL, switch_managers=4, without_infiniband=[KERNEL])
    names = says("__nvidia_driver_plain", suite, board, **given)
    assert [name for name in names if "modules-extra" in name] == taken
    assert says("__nvidia_driver_unreachable", suite, board, **given) == unreachable


def test_every_boot_loads_what_the_switches_are_reached_by() -> None:
    text = render("nvidia_driver", "modules-load.conf.j2", "noble", ansible_managed="managed")
    assert [line for line in text.splitlines() if line and not line.startswith("#")] == list(
        nvidia_facts.INFINIBAND_MODULES
    )


def test_the_switches_of_nvlink_5_are_told_by_the_product_data_of_what_leads_to_them(tmp_path: Path) -> None:
    board(tmp_path, *[(b"\x82\x00V3\x05SMDL\x06SW_MNG\xff", "0x020700")] * 4, (b"\x82\x00ConnectX-7", "0x020700"))
    seen = nvidia_facts.look(tmp_path)
    assert (len(seen["gpus"]), seen["nvswitches"], seen["switch_managers"]) == (8, 0, 4)


@pytest.mark.parametrize(
    ("gpu", "vendor", "kind", "data"),
    [
        ("0x2330", "0x15b3", "0x020700", b"SW_MNG"),  # Hopper has its switches on the bus
        ("0x2901", "0x8086", "0x020700", b"SW_MNG"),
        ("0x2901", "0x15b3", "0x080100", b"SW_MNG"),
        ("0x2901", "0x15b3", "0x020700", None),  # a virtual function
    ],
)
def test_another_device_leads_to_no_switch(
    tmp_path: Path, gpu: str, vendor: str, kind: str, data: bytes | None
) -> None:
    board(tmp_path, (data, kind), gpu=gpu, vendor=vendor)
    assert nvidia_facts.look(tmp_path)["switch_managers"] == 0


def test_a_kernel_has_a_way_to_the_switches_where_it_has_both_modules(tmp_path: Path) -> None:
    board(tmp_path, (b"SW_MNG", "0x020700"))
    for modules, lacking in ((["mlx5_ib", "ib_umad"], []), (["mlx5_ib"], [os.uname().release])):
        known = " || ".join(f'[ "$5" = {module} ]' for module in modules)
        put(tmp_path / "usr/sbin/modinfo", f"#!/bin/sh\n{{ {known}; }} && echo $5.ko\n").chmod(0o755)
        assert nvidia_facts.look(tmp_path)["without_infiniband"] == lacking
    (tmp_path / "sys/bus/pci/devices/0000:80:00.0/vpd").unlink()
    assert nvidia_facts.look(tmp_path)["without_infiniband"] == [], "nobody needs them"


def board(root: Path, *connectx: tuple[bytes | None, str], gpu: str = "0x2901", vendor: str = "0x15b3") -> None:
    """Eight GPUs on the bus of `root`, and ConnectX devices by product data and class."""
    devices = root / "sys/bus/pci/devices"
    for number in range(8):
        for name, text in (("vendor", "0x10de"), ("class", "0x030200"), ("device", gpu)):
            put(devices / f"0000:{number + 16:02x}:00.0" / name, text)
    for number, (data, kind) in enumerate(connectx):
        place = devices / f"0000:{number + 128:02x}:00.0"
        for name, text in (("vendor", vendor), ("class", kind), ("device", "0x1021")):
            put(place / name, text)
        if data is not None:
            (place / "vpd").write_bytes(data)


def test_from_590_on_a_package_pins_the_branch_that_names_no_longer_carry() -> None:
    names = says(
        "__nvidia_driver_apt_names",
        "noble",
        host(BLACKWELL, switch_managers=4),
        nvidia_driver_source="nvidia",
        nvidia_driver_branch="595",
        __nvidia_driver_release="595.71.05",
    )
    assert {"nvidia-open=595.71.05-*", "nvidia-fabricmanager=595.71.05-*", "nvidia-driver-pinning-595"} <= set(names)


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("ii  nvidia-smi 535.261.03-1", True),
        ("ii  libnvidia-ml1 535.261.03-1", True),
        ("ii  firmware-nvidia-gsp 535.261.03-1", True),
        ("ii  libcuda1 535.261.03-1", True),
        ("ii  linux-modules-nvidia-580-server-open-generic 6.8.0-60.63", True),
        ("ii  nvlsm 2025.10.14-1", True),
        ("ii  nvidia-container-toolkit 1.18.2-1", False),
        ("ii  libnvidia-container1 1.18.2-1", False),
        ("ii  openssl 3.0.17-1", False),
        ("rc  nvidia-smi 535.261.03-1", False),
    ],
)
def test_all_of_a_driver_is_held_and_nothing_else(line: str, ours: bool) -> None:
    unheld = says("__nvidia_driver_unheld", "bookworm", __nvidia_driver_dpkg_now={"stdout": line})
    assert unheld == ([line.split()[1]] if ours else [])


def test_what_is_installed_in_another_release_is_missing() -> None:
    dpkg = "\n".join(
        [
            "ii  adduser 3.134",  # a version without a dash: what follows it is read as well
            "hi  nvidia-utils-580-server 580.95.05-0ubuntu0.24.04.1",
            "hi  nvidia-compute-utils-580-server 580.65.06-0ubuntu0.24.04.1",
            "hi  nvidia-headless-no-dkms-580-server-open 580.95.05-0ubuntu0.24.04.1",
            "ii  linux-modules-nvidia-580-server-open-generic 6.8.0-60.63",
        ]
    )
    missing = says(
        "__nvidia_driver_missing",
        "noble",
        __nvidia_driver_dpkg={"stdout": dpkg},
        __nvidia_driver_release="580.95.05",
    )
    assert sorted(missing) == ["libnvidia-encode-580-server", "nvidia-compute-utils-580-server"]


@pytest.mark.parametrize(("release", "moves"), [("570.2", True), ("570.1", False)])
def test_what_is_of_the_branch_moves_with_the_driver_and_stays_with_it(release: str, moves: bool) -> None:
    dpkg = {"stdout": "hi  nvidia-open-570 570.1-1\nhi  nvidia-persistenced 570.1-1\n"}
    given: dict[str, Any] = {
        "nvidia_driver_source": "nvidia",
        "nvidia_driver_branch": "570",
        "nvidia_driver_packages_extra": ["more"],
    }
    names = says(
        "__nvidia_driver_apt_names", "trixie", **given, __nvidia_driver_dpkg=dpkg, __nvidia_driver_release=release
    )
    assert f"nvidia-open-570={release}-*" in names
    assert ("nvidia-persistenced=570.*" in names) is moves


@pytest.mark.parametrize(("has", "wanted"), [("570.2", "570.2-*"), ("570.22", "570.*")])
def test_what_is_of_the_branch_moves_to_the_very_release_where_apt_has_it(has: str, wanted: str) -> None:
    madison = {"stdout": f" nvidia-persistenced | {has}-1 | file:/srv/nvidia  Packages\n"}
    given: dict[str, Any] = {"nvidia_driver_source": "nvidia", "nvidia_driver_branch": "570"}
    names = says(
        "__nvidia_driver_apt_names",
        "trixie",
        **given,
        __nvidia_driver_madison=madison,
        __nvidia_driver_release="570.2",
    )
    assert [name for name in names if "persistenced" in name] == [f"nvidia-persistenced={wanted}"]


# -- Secure Boot -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("seen", "given", "wants"),
    [
        ({"secure_boot": True}, NVIDIA, True),
        ({"secure_boot": True, "loaded": "580.95.05"}, NVIDIA, False),
        ({"secure_boot": True}, {**NVIDIA, "nvidia_driver_mok_enrolled": True}, False),
        ({"secure_boot": False}, NVIDIA, False),
        ({"secure_boot": None}, NVIDIA, False),
    ],
)
def test_a_key_is_wanted_where_secure_boot_would_refuse_what_is_built_here(
    suite: str, seen: dict[str, Any], given: dict[str, Any], wants: bool
) -> None:
    assert says("__nvidia_driver_wants_mok", suite, host(H100, **seen), **given) is wants


@pytest.mark.parametrize("suite", ["jammy", "noble"])
@pytest.mark.parametrize("prebuilt", [True, False])
def test_ubuntus_signed_modules_want_no_key(suite: str, prebuilt: bool) -> None:
    wants = says("__nvidia_driver_wants_mok", suite, host(H100, secure_boot=True), nvidia_driver_prebuilt=prebuilt)
    assert wants is not prebuilt


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_the_words_name_the_certificate_that_the_key_is_made_with(suite: str) -> None:
    """On Debian it is made by openssl; Ubuntu's own program knows where its DKMS looks."""
    is_ubuntu = DISTRIBUTIONS[suite][0] == "Ubuntu"
    certificate = "/var/lib/shim-signed/mok/MOK.der" if is_ubuntu else "/var/lib/dkms/mok.pub"
    _, message = refusal("Refuse modules that Secure Boot will not load")
    given = {"inventory_hostname": "gpu-1", "ansible_check_mode": False}
    sentence = told(message, suite, host(H100, secure_boot=True), **given, __nvidia_driver_mok_own={"stdout": ""})
    assert f"Run on gpu-1, as root: mokutil --import {certificate} " in sentence
    assert ("nvidia_driver_prebuilt: true" in sentence) is is_ubuntu
    made = says("__nvidia_driver_mok_maker", suite)
    assert made == ["/usr/sbin/update-secureboot-policy", "--new-key"] if is_ubuntu else made[-1] == certificate
    own = told(message, suite, host(H100), **given, __nvidia_driver_mok_own={"stdout": "/srv/site.der"})
    assert "mokutil --import /srv/site.der " in own


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_nouveau_is_neither_loaded_for_a_card_nor_takes_it_where_somebody_loads_it(suite: str) -> None:
    text = render("nvidia_driver", "modprobe.conf.j2", suite, ansible_managed="managed")
    said = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert said == ["blacklist nouveau", "options nouveau modeset=0"]


def test_ubuntus_persistence_daemon_is_told_to_persist() -> None:
    text = render("nvidia_driver", "persistenced.conf.j2", "noble", ansible_managed="managed")
    assert says("__nvidia_driver_persistence_off", "noble") is True
    assert text.splitlines()[-3:] == [
        "[Service]",
        "ExecStart=",
        "ExecStart=/usr/bin/nvidia-persistenced --user nvidia-persistenced --persistence-mode --verbose",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Components: main\n", "Components: main COMPONENT\n"),
        ("Components: main contrib non-free-firmware  \n", "Components: main contrib non-free-firmware COMPONENT\n"),
        ("Components: main COMPONENT\n", None),
        ("Components: contrib\n", None),
    ],
)
def test_components_come_beside_main_once(text: str, expected: str | None) -> None:
    pattern = says("__nvidia_driver_component_lines", "trixie")[".sources"].replace("COMPONENT", "non-free")
    wanted = text if expected is None else expected
    assert re.sub(pattern, r"\1 non-free", text.replace("COMPONENT", "non-free")) == wanted.replace(
        "COMPONENT", "non-free"
    )


# -- what a host says ------------------------------------------------------------------------------------------------


def test_the_fixture_is_a_host_with_two_cards_of_one_board() -> None:
    seen = nvidia_facts.look(FAKE_ROOT)
    assert [gpu["device"] for gpu in seen["gpus"]] == ["10de:2330", "10de:2330"]
    assert seen["nvswitches"] == 1
    assert (seen["loaded"], seen["secure_boot"], seen["nouveau_loaded"]) == (None, None, False)


@pytest.mark.parametrize(
    ("text", "version", "is_open"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.261.03  Tue Jul 22 2025\nGCC version: gcc 12.2.0",
            "535.261.03",
            False,
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build  (x)", "570.133.20", True),
        ("something else 1.2.3", None, False),
    ],
)
def test_the_loaded_driver_is_read_from_the_kernel(
    tmp_path: Path, text: str, version: str | None, is_open: bool
) -> None:
    put(tmp_path / "proc/driver/nvidia/version", text)
    seen = nvidia_facts.look(tmp_path)
    assert (seen["loaded"], seen["loaded_open"]) == (version, is_open)


@pytest.mark.parametrize(("value", "expected"), [(b"\6\0\0\0\1", True), (b"\6\0\0\0\0", False), (b"", None)])
def test_secure_boot_is_read_from_the_firmware(tmp_path: Path, value: bytes, expected: bool | None) -> None:
    path = tmp_path / nvidia_facts.SECURE_BOOT
    path.parent.mkdir(parents=True)
    path.write_bytes(value)
    assert nvidia_facts.look(tmp_path)["secure_boot"] is expected


@pytest.mark.parametrize(
    ("vendor", "kind", "counted"),
    [
        ("0x10de", "0x030000", True),
        ("0x10de", "0x030200", True),
        ("0x10de", "0x040300", False),  # the card's own sound
        ("0x1002", "0x030000", False),
    ],
)
def test_a_card_is_a_display_controller_of_nvidia(tmp_path: Path, vendor: str, kind: str, counted: bool) -> None:
    for name, text in (("vendor", vendor), ("class", kind), ("device", "0x2330")):
        put(tmp_path / "sys/bus/pci/devices/0000:18:00.0" / name, text)
    assert len(nvidia_facts.look(tmp_path)["gpus"]) == counted


def test_a_modinfo_that_fails_or_hangs_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_facts, "KMOD_TIMEOUT_S", 0.2)
    for script in ("exit 1", "exec sleep 60", "echo"):
        put(tmp_path / "usr/sbin/modinfo", f"#!/bin/sh\n{script}\n").chmod(0o755)
        assert nvidia_facts.look(tmp_path)["on_disk"] is None
    put(tmp_path / "usr/sbin/modinfo", f'#!/bin/sh\n[ "$2" = {os.uname().release} ] && echo 1.2\n').chmod(0o755)
    assert nvidia_facts.look(tmp_path)["on_disk"] == "1.2"


@pytest.mark.parametrize(
    ("told", "file"),
    [
        ("insmod /lib/modules/6.8.0/updates/dkms/nvidia.ko", "nvidia"),  # Ubuntu, and NVIDIA's packages
        ("install modprobe -i nvidia-current-open $CMDLINE_OPTS ", "nvidia-current-open"),  # Debian, by its settings
        ("install modprobe -i nvidia-current $CMDLINE_OPTS ", "nvidia-current"),
        ("install modprobe -i nvidia-tesla-535 $CMDLINE_OPTS ", "nvidia-tesla-535"),
        ("install /sbin/modprobe --ignore-install nvidia && /sbin/modprobe nvidia-uvm", "nvidia"),
    ],
)
def test_the_driver_on_disk_is_the_one_that_would_be_loaded_whatever_its_file_is_called(
    tmp_path: Path, told: str, file: str
) -> None:
    others = {"nvidia", "nvidia-current", "nvidia-current-open", "nvidia-tesla-535"} - {file}
    put(tmp_path / "usr/sbin/modprobe", f"#!/bin/sh\necho '{told}'\n").chmod(0o755)
    put(tmp_path / "usr/sbin/modinfo", by_name({file: "535.261.03"} | dict.fromkeys(others, "470.1"))).chmod(0o755)
    for release in ("1.8.0-9-generic", "1.8.0-60-generic"):
        (tmp_path / "lib/modules" / release).mkdir(parents=True)
        put(tmp_path / f"boot/vmlinuz-{release}", "")
    seen = nvidia_facts.look(tmp_path)
    assert (seen["on_disk"], seen["next_on_disk"]) == ("535.261.03", "535.261.03")


@pytest.mark.parametrize("there", ["nvidia", "nvidia-current"])
def test_a_driver_that_modprobe_would_not_load_is_not_on_disk(tmp_path: Path, there: str) -> None:
    put(tmp_path / "usr/sbin/modprobe", "#!/bin/sh\necho install modprobe -i nvidia-current-open\n").chmod(0o755)
    put(tmp_path / "usr/sbin/modinfo", by_name({there: "535.261.03"})).chmod(0o755)
    seen = nvidia_facts.look(tmp_path)
    assert (seen["on_disk"], seen["next_on_disk"]) == (None, None)


@pytest.mark.parametrize("file", ["nvidia", "nvidia-current", "nvidia-current-open"])
def test_where_nothing_is_told_the_driver_on_disk_is_the_one_that_is_there(tmp_path: Path, file: str) -> None:
    put(tmp_path / "usr/sbin/modprobe", "#!/bin/sh\nexit 1\n").chmod(0o755)
    put(tmp_path / "usr/sbin/modinfo", by_name({file: "535.261.03", "nvidia-fs": "2.19.7"})).chmod(0o755)
    assert nvidia_facts.look(tmp_path)["on_disk"] == "535.261.03"


def by_name(versions: dict[str, str]) -> str:
    """A `modinfo` that answers as the real one does, by the name of the file."""
    cases = "".join(f"    {name}) echo {version} ;;\n" for name, version in versions.items())
    return f'#!/bin/sh\ncase "$5" in\n{cases}    *) exit 1 ;;\nesac\n'


@pytest.mark.parametrize(
    ("nvidia", "reasons"),
    [
        (host(H100), []),
        (host(H100, loaded="1", on_disk="1"), []),
        (host(H100, loaded="1", on_disk="2"), ["the kernel runs driver 1 and the disk holds 2"]),
        (host(H100, on_disk="2"), ["driver 2 is installed and not loaded"]),
        (host(H100, nouveau_loaded=True), ["nouveau holds the cards"]),
        (host(H100, has_programs=True), [f"no driver for kernel {KERNEL}"]),
        (host(H100, has_programs=True, loaded="1", on_disk="1"), []),
        (host(has_programs=True), []),
    ],
)
def test_a_reboot_has_its_reasons(nvidia: dict[str, Any], reasons: list[str]) -> None:
    assert says("__nvidia_driver_reasons", "noble", nvidia) == reasons


@pytest.mark.parametrize(
    ("nvidia", "lacks_it"),
    [
        (host(H100, loaded="1", on_disk="1"), False),
        (host(H100, loaded="1", on_disk="1", next_kernel=NEXT, next_on_disk=None), True),
        (host(H100, has_programs=True, next_kernel=NEXT, next_on_disk="1"), False),
        (host(H100, has_programs=True), True),
        (host(H100), False),  # nobody has installed a driver there
        (host(has_programs=True), False),
    ],
)
def test_a_reboot_into_a_kernel_without_the_driver_is_known_beforehand(nvidia: dict[str, Any], lacks_it: bool) -> None:
    assert says("__nvidia_driver_next_lacks_it", "noble", nvidia) is lacks_it


def test_the_next_boot_is_the_newest_kernel_that_is_there_and_has_its_own_module(tmp_path: Path) -> None:
    put(tmp_path / "usr/sbin/modinfo", f'#!/bin/sh\n[ "$2" = {os.uname().release} ] && echo 1.2\n').chmod(0o755)
    alone = nvidia_facts.look(tmp_path)
    assert (alone["next_kernel"], alone["next_on_disk"]) == (os.uname().release, "1.2")
    for release in ("1.8.0-9-generic", "1.8.0-60-generic", "1.8.0-101-generic"):
        (tmp_path / "lib/modules" / release).mkdir(parents=True)
    for release in ("1.8.0-9-generic", "1.8.0-60-generic"):  # of the newest only modules are left
        put(tmp_path / f"boot/vmlinuz-{release}", "")
    seen = nvidia_facts.look(tmp_path)
    assert (seen["on_disk"], seen["next_kernel"], seen["next_on_disk"]) == ("1.2", "1.8.0-60-generic", None)


def test_a_driver_that_was_installed_is_known_by_its_programs(tmp_path: Path) -> None:
    assert nvidia_facts.look(tmp_path)["has_programs"] is False
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/nvidia-smi").symlink_to("/etc/alternatives/of-debian")
    assert nvidia_facts.look(tmp_path)["has_programs"] is True


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
