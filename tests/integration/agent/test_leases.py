"""A lease on a real host, through the front door: who gets in, until when, and that the end comes by itself."""

from __future__ import annotations

import pytest

from tests.integration.agent.conftest import Site

pytestmark = pytest.mark.hosts


def test_a_lease_lets_in_its_key_and_no_other(site: Site) -> None:
    lease = site.open_lease()
    assert site.sign_in(lease, "id", "-un").stdout.strip() == lease.login
    stranger, _ = site.new_key()
    assert site.sign_in(lease, key=stranger).returncode == 255
    assert "sudo" not in site.sign_in(lease, "id").stdout
    assert site.sign_in(lease, "stat", "-c", "%a", ".").stdout.strip() == "700"
