"""Makes two more releases of the one that was built: `releases.py ARCHIVE FOLDER`.

`two.tar.gz` says so in /healthz, and has one more migration; `broken.tar.gz` does not start.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

MIGRATION = '''"""One more table, to see when it comes."""


def up(migrator, db):
    db.execute_sql("CREATE TABLE molecule_was_here (id INTEGER PRIMARY KEY)")
'''


def main(archive: Path, folder: Path) -> None:
    with TemporaryDirectory() as scratch:
        tree = Path(scratch)
        subprocess.run(["tar", "-xf", archive, "-C", tree], check=True)
        health = tree / "portal" / "api" / "health.py"
        changed = health.read_text().replace('jsonify(status="ok")', 'jsonify(status="ok", release="two")')
        if changed == health.read_text():
            raise SystemExit("health.py does not answer as expected any more")
        health.write_text(changed)
        (tree / "portal" / "migrations" / "9998_molecule.py").write_text(MIGRATION)
        pack(tree, folder / "two.tar.gz")
        (tree / "portal" / "app.py").write_text('raise SystemExit("this release is broken")\n')
        pack(tree, folder / "broken.tar.gz")


def pack(tree: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as packed:
        for path in sorted(tree.iterdir()):
            packed.add(path, arcname=path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
