#!/usr/bin/python3
"""A small apt repository on a test host, so that versions, pins, holds and conflicts are apt's own doing.

    apt_repository.py build SPEC DIR              packages of a JSON list into DIR/pool
    apt_repository.py rename DEB DIR NAME=… …      a real package into DIR/pool under other control fields
    apt_repository.py index DIR --suite S …       DIR/dists/S with the index of what lies in DIR/pool; flat without S

A package of the list: {"name", "version"} and, where it needs them, "fields" (of its control file), "files" (path:
text), "programs" (the same, executable) and "postinst". Nothing but Python and dpkg-deb is needed, and gpg-agent for
`--sign`; without it a host has to say [trusted=yes].
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
from email.utils import formatdate
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    words = parser.add_subparsers(required=True)
    building = words.add_parser("build")
    building.add_argument("spec", type=Path)
    building.add_argument("folder", type=Path)
    building.set_defaults(
        act=lambda options: [build(package, options.folder) for package in json.loads(options.spec.read_text())]
    )
    renaming = words.add_parser("rename")
    renaming.add_argument("deb", type=Path)
    renaming.add_argument("folder", type=Path)
    renaming.add_argument("fields", nargs="+", help="Field=value; an empty value takes the field out")
    renaming.set_defaults(act=rename)
    indexing = words.add_parser("index")
    indexing.add_argument("folder", type=Path)
    for name, value in (("suite", ""), ("component", "main"), ("origin", "Test"), ("label", "Test"), ("codename", "")):
        indexing.add_argument(f"--{name}", default=value)
    indexing.add_argument("--sign", type=Path, metavar="KEY", help="sign it, and write the public key there")
    indexing.set_defaults(act=index)
    options = parser.parse_args()
    options.act(options)


def build(package: dict[str, Any], folder: Path) -> None:
    """One .deb below folder/pool. Raises CalledProcessError when dpkg-deb refuses it."""
    fields = {
        "Package": package["name"],
        "Version": package["version"],
        "Architecture": architecture(),
        "Maintainer": "RemoteGPU tests <root@localhost>",
        **package.get("fields", {}),
        "Description": "stands in for the real package on a test host",
    }
    pool = folder / "pool"
    pool.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        root.chmod(0o755)
        (root / "DEBIAN").mkdir()
        (root / "DEBIAN/control").write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
        if "postinst" in package:
            place(root / "DEBIAN/postinst", "#!/bin/sh\nset -e\n" + package["postinst"] + "\n", 0o755)
        for kind, mode in (("files", 0o644), ("programs", 0o755)):
            for path, text in package.get(kind, {}).items():
                place(root / path.lstrip("/"), text, mode)
        pack(root, pool / f"{package['name']}_{package['version'].replace(':', '%3a')}.deb")


def rename(options: argparse.Namespace) -> None:
    """Everything of the package but what `fields` say. Scripts and files stay as they are."""
    (options.folder / "pool").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        subprocess.run(["dpkg-deb", "--raw-extract", str(options.deb), str(root)], check=True)
        control = root / "DEBIAN/control"
        fields: dict[str, str] = {}
        name = ""
        for line in control.read_text().splitlines():
            if line.startswith(" "):
                fields[name] += f"\n{line}"
            else:
                name, _, value = line.partition(": ")
                fields[name] = value
        fields |= dict(field.split("=", 1) for field in options.fields)
        control.write_text("".join(f"{name}: {value}\n" for name, value in fields.items() if value))
        pack(root, options.folder / "pool" / f"{fields['Package']}.deb")


def pack(root: Path, deb: Path) -> None:
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(root), str(deb)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def place(path: Path, text: str, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def index(options: argparse.Namespace) -> None:
    """Packages and Release, as `deb URI SUITE COMPONENT` looks for them, or `deb URI /` without a suite."""
    folder: Path = options.folder
    release = folder / "dists" / options.suite if options.suite else folder
    packages = (
        release / options.component / f"binary-{architecture()}" / "Packages" if options.suite else folder / "Packages"
    )
    packages.parent.mkdir(parents=True, exist_ok=True)
    packages.write_text("\n".join(stanza(deb, folder) for deb in sorted((folder / "pool").glob("*.deb"))))
    content = packages.read_bytes()
    (release / "Release").write_text(
        f"Origin: {options.origin}\nLabel: {options.label}\nSuite: {options.suite}\n"
        f"Codename: {options.codename or options.suite}\nDate: {formatdate(usegmt=True)}\n"
        f"Architectures: {architecture()}\nComponents: {options.component}\n"
        f"SHA256:\n {hashlib.sha256(content).hexdigest()} {len(content)} {packages.relative_to(release)}\n"
    )
    if options.sign:
        sign(release, options.sign)


def sign(release: Path, key: Path) -> None:
    """InRelease by a key of this host's own, whose public half is written to `key`. Needs gpg and its agent."""
    home = Path("/root/.apt-repository")
    home.mkdir(mode=0o700, exist_ok=True)
    gpg = [
        "gpg",
        "--homedir",
        str(home),
        "--batch",
        "--yes",
        "--quiet",
        "--passphrase",
        "",
        "--pinentry-mode",
        "loopback",
    ]
    if not (home / "pubring.kbx").exists():
        subprocess.run([*gpg, "--quick-generate-key", "Test repository", "ed25519", "sign", "never"], check=True)
    subprocess.run([*gpg, "--armor", "--output", str(key), "--export"], check=True)
    subprocess.run([*gpg, "--clearsign", "--output", str(release / "InRelease"), str(release / "Release")], check=True)


def stanza(deb: Path, folder: Path) -> str:
    control = subprocess.run(["dpkg-deb", "--field", str(deb)], check=True, capture_output=True, text=True).stdout
    content = deb.read_bytes()
    return (
        f"{control.rstrip()}\nFilename: {deb.relative_to(folder)}\n"
        f"Size: {len(content)}\nSHA256: {hashlib.sha256(content).hexdigest()}\n"
    )


def architecture() -> str:
    return subprocess.run(["dpkg", "--print-architecture"], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
