"""Execute runs and sweep, until SIGTERM or Ctrl-C. Any number may run, on any number of machines."""

from __future__ import annotations

import argparse
import logging

from portal.settings import load


def run(args: argparse.Namespace) -> None:  # noqa: ARG001 - it takes none
    from portal.worker.main import main

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    main(load())
