"""The portal's own authority stays, and is replaced as the operator's guide says without shutting a host out."""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from portal.integrations import ca
from portal.services import alerts_own
from portal.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site(settings: Settings, database: Any) -> Settings:
    """A portal that hosts reach over TLS, with an authority of its own."""
    object.__setattr__(settings, "public_url", "https://localhost")
    assert ca.ensure(settings)
    return settings


def is_let_in(trusted: Path, site: Settings) -> bool:
    """Whether a host that trusts these authorities, as its agent does, talks to a portal that shows its certificate."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(site.certificate_file, site.certificate_key_file)
    to_host, to_portal = ssl.MemoryBIO(), ssl.MemoryBIO()
    portal = serving.wrap_bio(to_portal, to_host, server_side=True)
    host = ssl.create_default_context(cafile=trusted).wrap_bio(to_host, to_portal, server_hostname="localhost")
    for _ in range(4):
        for side in (host, portal):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:
                return False
    return True


def test_an_authority_that_is_there_stays(site: Settings) -> None:
    before = site.ca_file.read_bytes()
    assert not ca.ensure(site)
    site.certificate_file.unlink()
    assert ca.ensure(site), "its certificate is made anew"
    assert site.ca_file.read_bytes() == before
    assert is_let_in(site.ca_file, site)


def test_a_new_authority_comes_as_the_guide_says_and_no_host_is_shut_out(site: Settings, tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "operator.md").read_text()
    assert "## A new authority" in guide, "where the alert sends people"
    old, both = tmp_path / "old.pem", tmp_path / "both.pem"
    shutil.copy(site.ca_file, old)

    (site.ca_file.parent / "ca.key").unlink()
    assert not ca.ensure(site), "what is shown is still signed by the old one"
    assert site.ca_file.read_bytes() != old.read_bytes()
    assert is_let_in(old, site)
    assert not is_let_in(site.ca_file, site)

    both.write_bytes(site.ca_file.read_bytes() + old.read_bytes())
    object.__setattr__(site, "host_ca_file", str(both))
    assert is_let_in(both, site), "hosts that were provisioned meanwhile"
    new = x509.load_pem_x509_certificate(site.ca_file.read_bytes())
    assert alerts_own.certificates()["ca"] == new.not_valid_after_utc, "the first of the file: the alert is over"

    site.certificate_file.unlink()
    assert ca.ensure(site)
    assert is_let_in(both, site)
    assert is_let_in(site.ca_file, site)
    assert not is_let_in(old, site)
