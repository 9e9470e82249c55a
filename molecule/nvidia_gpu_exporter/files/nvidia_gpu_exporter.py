#!/usr/bin/python3
"""Stands in for nvidia_gpu_exporter 1.14.0: its flags, its background collection, its names of metrics.

Runs `nvidia-smi --query-gpu` as the real one does and names what comes back by the same rules: dots and camel case to
snake case, units to a suffix in base units, states to numbers; what is in brackets or bare `N/A` is no series, and a
row with more cells than the header spoils that collection. Started while nvidia-smi fails it asks for a field of its
own making ever after, as 1.2.0 did with its built-in list. What no test of ours needs (TLS, per-process metrics, other
backends) is not here.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

INFO = (
    "name",
    "driver_model.current",
    "driver_model.pending",
    "vbios_version",
    "driver_version",
    "pci.bus_id",
    "serial",
    "index",
)
UNITS = {
    "MiB": ("_bytes", 1048576.0),
    "%": ("_ratio", 0.01),
    "MHz": ("_clock_hz", 1e6),
    "W": ("_watts", 1.0),
    "us": ("_seconds", 1e-6),
    "ms": ("_seconds", 1e-3),
}
STATES = {
    **dict.fromkeys(("Enabled", "Yes", "Active"), 1.0),
    **dict.fromkeys(("Disabled", "No", "Not Active", "Default"), 0.0),
    "Exclusive_Thread": 1.0,
    "Prohibited": 2.0,
    "Exclusive_Process": 3.0,
}


class Collector:
    def __init__(self, options: argparse.Namespace) -> None:
        self.command = options.nvidia_smi_command.split()
        self.fields = options.query_field_names.split(",")
        self.timeout_s = seconds(options.collect_timeout)
        self.failed = 0
        self.succeeded_at = 0.0
        self.text = health(0, 0, 0.0, 0.0, 0)
        if self.run()[0] != 0:
            self.fields = [*self.fields, "a.field.that.no.driver.knows"]

    def run(self) -> tuple[int, str]:
        argv = [*self.command, f"--query-gpu={','.join(self.fields)}", "--format=csv"]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=self.timeout_s)
        except (OSError, subprocess.TimeoutExpired):
            return -1, ""
        return done.returncode, done.stdout

    def collect(self) -> None:
        began = time.time()
        code, output = self.run()
        found = gpus(output) if code == 0 else None
        self.failed += found is None
        if found is not None:
            self.succeeded_at = time.time()
        self.text = health(int(found is not None), code, self.succeeded_at, time.time() - began, self.failed)
        self.text += found or ""

    def forever(self, interval_s: float) -> None:
        while True:
            self.collect()
            time.sleep(interval_s)


def health(success: int, code: int, at: float, took: float, failed: int) -> str:
    return (
        f"nvidia_smi_last_collect_success {success}\n"
        f"nvidia_smi_command_exit_code {code}\n"
        f"nvidia_smi_last_collect_success_timestamp_seconds {at:.3f}\n"
        f"nvidia_smi_last_collect_duration_seconds {took:.6f}\n"
        f"nvidia_smi_failed_scrapes_total {failed}\n"
    )


def gpus(output: str) -> str | None:
    """The series of every GPU; None where a name with a comma shifts the cells of one."""
    header, *rows = [line.split(", ") for line in output.splitlines()]
    if any(len(row) != len(header) for row in rows):
        return None
    lines = []
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        uuid = cells["uuid"].lower().removeprefix("gpu-")
        labels = "".join(f',{snake(name)}="{cells[name]}"' for name in INFO if name in cells)
        lines.append(f'nvidia_smi_gpu_info{{uuid="{uuid}"{labels}}} 1\n')
        for title, cell in cells.items():
            name, value = metric(title, cell)
            if value is not None:
                lines.append(f'nvidia_smi_{name}{{uuid="{uuid}"}} {value:.15g}\n')
    return "".join(lines)


def metric(title: str, cell: str) -> tuple[str, float | None]:
    """The name of a column's series and the number in a cell; None where it holds none."""
    field, _, unit = title.removesuffix("]").partition(" [")
    suffix, factor = UNITS.get(unit, ("", 1.0))
    return snake(field) + suffix, number(cell.removesuffix(f" {unit}") if unit else cell, factor)


def number(text: str, factor: float) -> float | None:
    if text in STATES:
        return STATES[text]
    if re.fullmatch(r"P\d+", text):
        return float(text[1:])
    if re.fullmatch(r"0x[0-9A-Fa-f]+", text):
        return float(int(text, 16))
    try:
        return float(text) * factor
    except ValueError:
        return None


def snake(field: str) -> str:
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", field.replace(".", "_")).lower()


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--web.listen-address", dest="listen_address", default=":9835")
    parser.add_argument("--nvidia-smi-command", default="nvidia-smi")
    parser.add_argument("--query-field-names", default="AUTO")
    parser.add_argument("--collect.interval", dest="collect_interval", default="0s")
    parser.add_argument("--collect.timeout", dest="collect_timeout", default="10s")
    options = parser.parse_args()
    if options.query_field_names == "AUTO" or seconds(options.collect_interval) <= 0:
        parser.error("the role says its fields and its interval")
    collector = Collector(options)
    threading.Thread(target=collector.forever, args=[seconds(options.collect_interval)], daemon=True).start()

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = collector.text.encode()
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(content if self.path == "/metrics" else b"")

    host, _, port = options.listen_address.rpartition(":")
    ThreadingHTTPServer((host.strip("[]"), int(port)), Metrics).serve_forever()


if __name__ == "__main__":
    main()
