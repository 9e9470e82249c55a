#!/usr/bin/python3
"""A kernel module as far as kmod reads one, and the index of all of them: `kernel_module ROOT FILE FIELD=VALUE…`.

    kernel_module / updates/dkms/nvidia-current-open.ko name=nvidia version=535.261.03

FILE lies in the folder of the kernel that runs, below ROOT. `modinfo` tells its fields; it holds no code, so no kernel
would load it. One that ends in .xz is compressed, as what DKMS builds for Debian 13 is.
"""

from __future__ import annotations

import lzma
import platform
import struct
import subprocess
import sys
from pathlib import Path

HEADER, SECTION = "<16sHHIQQQIHHHHHH", "<IIQQQQIIQQ"  # of a 64-bit ELF file
NAMES = b"\0.modinfo\0.symtab\0.strtab\0.shstrtab\0"
RELOCATABLE, MACHINES = 1, {"x86_64": 62, "aarch64": 183}
NOTHING, PROGRAM, SYMBOLS, STRINGS = 0, 1, 2, 3  # kinds of sections


def main(root: str, name: str, *fields: str) -> None:
    kernel = platform.release()
    folder = Path(root, "lib/modules", kernel)
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    content = module(b"".join(field.encode() + b"\0" for field in fields))
    is_small = file.suffix == ".xz"  # with the one checksum that kmod knows
    file.write_bytes(lzma.compress(content, check=lzma.CHECK_CRC32) if is_small else content)
    for beside in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        (folder / beside).touch()  # a kernel's package brings them
    subprocess.run(["depmod", "-b", root, kernel], check=True)


def module(information: bytes) -> bytes:
    """The file: a header, what is in each section, and the table that says where."""
    told = [
        ("", NOTHING, b""),
        (".modinfo", PROGRAM, information),
        (".symtab", SYMBOLS, bytes(24)),  # the one symbol that every table begins with
        (".strtab", STRINGS, b"\0"),
        (".shstrtab", STRINGS, NAMES),
    ]
    begin = struct.calcsize(HEADER)
    contents, table = b"", b""
    for name, kind, content in told:
        place = NAMES.index(f"{name}\0".encode()) if name else 0
        is_table = kind == SYMBOLS
        table += struct.pack(
            SECTION, place, kind, 0, 0, begin + len(contents), len(content), 3 * is_table, is_table, 1, 24 * is_table
        )
        contents += content
    header = struct.pack(
        HEADER, b"\x7fELF\2\1\1", RELOCATABLE, MACHINES[platform.machine()], 1, 0, 0, begin + len(contents),
        0, begin, 0, 0, struct.calcsize(SECTION), len(told), len(told) - 1,
    )  # fmt: skip
    return header + contents + table


if __name__ == "__main__":
    main(*sys.argv[1:])
