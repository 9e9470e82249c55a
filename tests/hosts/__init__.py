"""Real hosts for tests: Debian 12 and 13 with systemd, in containers, reached over SSH.

docker.py boots, reboots, cuts off and removes them, owner.py says whose they are; gpu.py says what their fake GPUs do;
fixtures.py is the pytest plugin over all; `python -m tests.hosts` is the same for shells and playbooks. Here is no
portal and no agent.
"""

from tests.hosts.docker import SUITES, Host, HostError, Result, attach, boot, gateway_address, list_hosts, unique
from tests.hosts.gpu import Scenario

__all__ = [
    "SUITES",
    "Host",
    "HostError",
    "Result",
    "Scenario",
    "attach",
    "boot",
    "gateway_address",
    "list_hosts",
    "unique",
]
