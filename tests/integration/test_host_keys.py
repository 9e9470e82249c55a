"""What the portal reads of host keys, beside OpenSSH's own programs."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from portal.errors import Unavailable
from portal.integrations import host_keys


def test_the_fingerprint_is_the_one_that_ssh_keygen_shows(tmp_path: Path) -> None:
    file = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True)
    kind, blob, _ = file.with_suffix(".pub").read_text().split(maxsplit=2)
    shown = subprocess.run(["ssh-keygen", "-lf", f"{file}.pub"], capture_output=True, text=True, check=True).stdout
    (found,) = host_keys.parse(f"host {kind} {blob}")
    assert found["fingerprint"] == shown.split()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where somebody listens and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_host_that_says_nothing_is_unavailable_in_time(silent_port: int) -> None:
    with pytest.raises(Unavailable, match="No SSH server answered"):
        host_keys.scan("127.0.0.1", silent_port, timeout_s=1)
