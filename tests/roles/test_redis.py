"""The role redis, as far as it can be told without a host, and a real server reading its files."""

from __future__ import annotations

import hashlib
import re
import socket
import subprocess
from pathlib import Path

import pytest
import redis

from tests.support.rendering import DISTRIBUTIONS, render
from tests.support.waiting import until

PASSWORD = "k8Rz4QpWx91-k8Rz4QpWx91-abc"


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_the_password_is_kept_as_a_hash(suite: str) -> None:
    rule = render("redis", "users.acl.j2", suite, redis_password=PASSWORD).strip()
    assert PASSWORD not in rule
    assert f"#{hashlib.sha256(PASSWORD.encode()).hexdigest()}" in rule.split()
    assert rule.split()[-2:] == ["+@all", "-@admin"]


def test_channels_are_named_only_where_the_server_knows_them() -> None:
    named = {s: "&*" in render("redis", "users.acl.j2", s, redis_password=PASSWORD).split() for s in DISTRIBUTIONS}
    assert named == {"bookworm": True, "trixie": True, "jammy": False, "noble": True}


@pytest.mark.parametrize("suite", DISTRIBUTIONS)
def test_nothing_is_ever_evicted_and_everything_is_logged(suite: str) -> None:
    lines = render("redis", "redis.conf.j2", suite, redis_listen_addresses=["127.0.0.1", "192.0.2.10"]).splitlines()
    assert {"maxmemory-policy noeviction", "appendonly yes", "protected-mode yes"} <= set(lines)
    assert "bind 127.0.0.1 192.0.2.10" in lines
    assert "maxmemory 2000mb" in lines, "an eighth of 16 GB"


@pytest.mark.slow  # it needs redis-server, which `make test-fast` may not ask for
def test_a_real_server_takes_the_files(tmp_path: Path) -> None:
    """This machine's own Redis, with the paths moved: what it refuses to read, it would refuse on a host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = render("redis", "redis.conf.j2", "bookworm", redis_port=port, __redis_etc=str(tmp_path))
    text = re.sub(r"(?m)^(dir|logfile|pidfile) .*$", "", text).replace("supervised systemd", "supervised no")
    (tmp_path / "redis.conf").write_text(f"{text}\ndir {tmp_path}\n")
    (tmp_path / "users.acl").write_text(render("redis", "users.acl.j2", "bookworm", redis_password=PASSWORD))
    with subprocess.Popen(["redis-server", tmp_path / "redis.conf"], stdout=subprocess.DEVNULL) as server:
        try:
            client = redis.Redis(port=port, password=PASSWORD)
            until(lambda: answers(client), "Redis to answer")
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.config_get("maxmemory")
            client.close()
            with redis.Redis(port=port) as nobody, pytest.raises(redis.exceptions.AuthenticationError):
                nobody.ping()
        finally:
            server.terminate()


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.exceptions.ConnectionError:
        return False
