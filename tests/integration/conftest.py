"""Real hosts, for the tests here that carry the marker `hosts`."""

from tests.hosts.fixtures import boot_host, operator_key, prepared_host

__all__ = ["boot_host", "operator_key", "prepared_host"]
