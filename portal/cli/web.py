"""Serve pages and API, until SIGTERM or Ctrl-C: gunicorn with gevent workers, over TLS unless a proxy does that."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from portal.settings import Settings

GRACE_S = 3  # held calls of agents last 20 s; they are cut, and the agents call again
CONNECTIONS = 10_000  # a process: held calls cost little


def run(args: argparse.Namespace) -> None:  # noqa: ARG001 - it takes none
    # Before anything else is imported: a socket, lock or thread from before would stop every greenlet at once.
    from gevent import monkey

    monkey.patch_all()
    _patch_postgresql()
    _bear_broken_handshakes()
    from portal.settings import load

    settings = load()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(counting_directory(settings.instance_dir))
    _serve(settings)


def _patch_postgresql() -> None:
    """Without it one slow query stops all greenlets of the process."""
    from psycogreen.gevent import patch_psycopg

    patch_psycopg()


def _bear_broken_handshakes() -> None:
    """Whoever connects and hangs up, or speaks no TLS, must not fill our log with tracebacks."""
    import ssl

    from gevent.hub import Hub

    Hub.NOT_ERROR = (*Hub.NOT_ERROR, ssl.SSLError)


def counting_directory(instance_dir: Path) -> Path:
    """Where the web processes of this server count requests together (api/metrics.py).

    Each start has a folder of its own, since a counter begins anew with it; those of servers that are gone are removed.
    Two may run side by side for a while: the new one beside the old one that still answers.
    """
    home = instance_dir / "metrics"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    own = home / str(os.getpid())
    for folder in home.iterdir():
        if folder == own or not (Path("/proc") / folder.name).exists():
            shutil.rmtree(folder, ignore_errors=True)
    own.mkdir(mode=0o700)
    return own


def _serve(settings: Settings) -> None:
    from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]  # it has none

    class Web(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
        def load_config(self) -> None:
            for name, value in options(settings).items():
                self.cfg.set(name, value)

        def load(self) -> Flask:
            """In each worker, after the fork: connections are never shared."""
            from portal.app import create_app

            return create_app(settings)

    Web().run()


def options(settings: Settings) -> dict[str, object]:
    """What gunicorn is told."""
    chosen: dict[str, object] = {
        "bind": settings.bind,
        "workers": settings.workers,
        "worker_class": "gevent",
        "worker_connections": CONNECTIONS,
        "graceful_timeout": GRACE_S,
        "timeout": 60,
        "keepalive": 30,
        "proc_name": "remotegpu-web",
        "control_socket_disable": True,
        "loglevel": "info",
        "accesslog": None,
        "errorlog": "-",
    }
    if settings.is_secure and not settings.trusted_proxies:
        chosen |= {"certfile": str(settings.certificate_file), "keyfile": str(settings.certificate_key_file)}
    return chosen
