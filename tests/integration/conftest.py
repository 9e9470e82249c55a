"""Real hosts, for the tests here that carry the marker `hosts`, and the fake GPUs without one."""

from tests.hosts.fixtures import boot_host, libraries, operator_key, prepared_host

__all__ = ["boot_host", "libraries", "operator_key", "prepared_host"]
