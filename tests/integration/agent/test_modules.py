"""Kernel modules that are first loaded during a lease, by the word of the suite's own dpkg and kmod.

The kernel below a test host has no modules to load, so what is loaded is told by a file in place of /proc/modules. The
files are those of Debian's own kernel package, which is unpacked and not booted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.hosts import Host, boot, unique
from tests.hosts.fixtures import EACH_SUITE
from tests.hosts.owner import keeps_hosts
from tests.support.cleaned_host import push_agent

pytestmark = pytest.mark.hosts

# The running kernel has another name than Debian's: `modinfo` looks for the one, and dpkg knows the other.
A_KERNEL = """
set -e
cd /root
apt-get update -qq
apt-get install -y -qq --no-install-recommends linux-base kmod >/dev/null
image=$(apt-cache depends "linux-image-cloud-$(dpkg --print-architecture)" | sed -n 's/.* Depends: //p' | head -n 1)
apt-get download -qq "$image"
dpkg --force-depends --unpack "$image"_*.deb
kernel=${image#linux-image-}
test -e "/lib/modules/$(uname -r)" || ln -s "$kernel" "/lib/modules/$(uname -r)"
"""
# `cuse` as DKMS builds a module, and `dummy` as Debian's NVIDIA driver is built: in a file of another name.
BUILT = """
set -e
cd "/lib/modules/$(uname -r)"
mkdir -p updates/dkms
cp kernel/fs/fuse/cuse.ko* updates/dkms/
for file in kernel/drivers/net/dummy.ko*; do mv "$file" "updates/dkms/dummy-current.${file#*/dummy.}"; done
depmod "$(basename "$(pwd -P)")"
rm /root/*.deb
"""
_CALL = """
import json, sys
sys.path.insert(0, "/opt/remotegpu/source")
sys.dont_write_bytecode = True
from remotegpu_agent import baseline, cleaning, verify
from remotegpu_agent.cleaning.scope import Scope
from remotegpu_agent.observe import modules
asked, modules.LOADED = json.load(sys.stdin), "/root/modules"
with open(modules.LOADED, "w") as file:
    file.writelines(f"{name} 16384 0 - Live 0x0000000000000000\\n" for name in asked["loaded"])
if asked["sections"] is None:
    answer = {name: baseline._READERS[name]() for name in ("modules", "module_files")}
else:
    step = next(each for each in cleaning.STEPS if each.id == "kernel_modules")
    check = verify.CHECKS["kernel_modules"]
    steps = step.run(Scope(17, "lease17", 20017, 20017, "/home/lease17", asked["sections"]), None)
    answer = [steps, verify._checked("kernel_modules", check, verify.Asked(17, "lease17", 20017, asked["sections"]))]
json.dump(answer, sys.stdout)
"""


@dataclass
class KernelHost:
    """The host, and its baseline with one module loaded."""

    host: Host
    sections: dict[str, Any]
    folder: str

    def sh(self, command: str) -> None:
        """Run it in the folder of the kernel's modules, whose index is then made anew."""
        self.host.run(f"set -e; cd {self.folder}; {command} >/dev/null; depmod $(basename {self.folder})")

    def judged(self, *loaded: str, sections: dict[str, Any] | None = None) -> tuple[str, str]:
        """Result and reason, of which cleaning and verification have the same."""
        given = {"sections": self.sections if sections is None else sections, "loaded": ["loop", *loaded]}
        step, check = _call(self.host, given)
        assert (step["result"], step["reason"]) == (check["result"], check["reason"])
        return check["result"], check["reason"] or ""


def _call(host: Host, given: dict[str, Any]) -> Any:
    return json.loads(host.run(["python3", "-I", "-c", _CALL], stdin=json.dumps(given)).stdout)


@pytest.fixture(scope="module", params=EACH_SUITE)
def kernel(request: pytest.FixtureRequest) -> Iterator[KernelHost]:
    host = boot(unique(f"modules-{request.param}"), request.param)
    try:
        push_agent(host)
        host.run(A_KERNEL, timeout_s=300)
        host.run(BUILT)
        folder = host.run('realpath "/lib/modules/$(uname -r)"').stdout.strip()
        yield KernelHost(host, _call(host, {"sections": None, "loaded": ["loop"]}), folder)
    finally:
        if not keeps_hosts():
            host.destroy()


def test_a_module_of_a_package_may_be_loaded_by_whoever_needs_it(kernel: KernelHost) -> None:
    """A socket of AF_ALG is enough, and any tenant may open one."""
    assert kernel.judged("af_alg", "algif_hash", "bonding") == ("passed", "")


def test_a_module_that_was_built_here_before_the_baseline_may_be_loaded_after_it(kernel: KernelHost) -> None:
    """By the first CUDA job, or at the next boot, also from a file of another name."""
    inner = [path.removeprefix(f"{kernel.folder}/") for path in kernel.sections["module_files"]]
    assert [path.partition(".ko")[0] for path in inner] == ["updates/dkms/cuse", "updates/dkms/dummy-current"]
    assert kernel.judged("cuse", "dummy") == ("passed", "")


def test_a_baseline_that_is_older_vouches_for_packages_alone(kernel: KernelHost) -> None:
    older = {"modules": ["loop"]}
    assert kernel.judged("af_alg", sections=older) == ("passed", "")
    for name in ("cuse", "dummy"):
        result, reason = kernel.judged(name, sections=older)
        assert (result, "the baseline is too old" in reason) == ("failed", True)
    assert kernel.judged("cuse", sections={"modules": ["cuse", "loop"]}) == ("passed", ""), "it was loaded then"


def test_a_module_that_no_file_is_known_of_fails(kernel: KernelHost) -> None:
    """Its file is gone, or the kernel has the one of that name built in."""
    built_in = kernel.host.run(f"head -n 1 {kernel.folder}/modules.builtin").stdout.strip().rpartition("/")[2]
    for name in ("left", built_in.partition(".")[0].replace("-", "_")):
        assert kernel.judged(name) == ("failed", f"kernel module {name} comes from no file that is known")


@pytest.mark.parametrize(
    ("left", "name", "said", "undone"),
    [
        pytest.param(
            "cp kernel/crypto/af_alg.ko* updates/dkms/",
            "af_alg",
            "/updates/dkms/af_alg.ko, which neither a package nor the baseline vouches for",
            "rm updates/dkms/af_alg.ko*",
            id="a new one among those of DKMS",
        ),
        pytest.param(
            "cp -p updates/dkms/cuse.ko* /root && cat kernel/crypto/af_alg.ko* | tee updates/dkms/cuse.ko*",
            "cuse",
            "/updates/dkms/cuse.ko, which has another content than in the baseline",
            "mv /root/cuse.ko* updates/dkms/",
            id="in place of one of DKMS",
        ),
        pytest.param(
            "mv updates/dkms/dummy-current.ko* /root && ln -s /root/dummy-current.ko* updates/dkms/",
            "dummy",
            " no file that is known",
            "rm updates/dkms/dummy-current.ko* && mv /root/dummy-current.ko* updates/dkms/",
            id="where a link leads",
        ),
        pytest.param(
            "cp -p kernel/crypto/af_alg.ko* /root && cat updates/dkms/cuse.ko* | tee kernel/crypto/af_alg.ko*",
            "af_alg",
            "/kernel/crypto/af_alg.ko, which neither a package nor the baseline vouches for",
            "mv /root/af_alg.ko* kernel/crypto/",
            id="in place of a package's",
        ),
        pytest.param(
            "for each in kernel/crypto/af_alg.ko*; do ln -s ../$each updates/left.${each#*.}; done",
            "left",
            "/kernel/crypto/af_alg.ko is another's",
            "rm updates/left.ko*",
            id="a name that leads to a package's",
        ),
    ],
)
def test_a_module_from_a_file_that_nobody_vouches_for_fails_by_it(
    kernel: KernelHost, left: str, name: str, said: str, undone: str
) -> None:
    """Whoever had root may write where DKMS does, too."""
    kernel.sh(left)
    try:
        result, reason = kernel.judged(name)
    finally:
        kernel.sh(undone)
    assert (result, said in re.sub(r"\.ko\.[a-z]+", ".ko", reason)) == ("failed", True), reason
    assert kernel.judged("af_alg", "cuse", "dummy") == ("passed", "")
