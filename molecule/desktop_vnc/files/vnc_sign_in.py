"""Signs in to a VNC server as a client does, over what a command says and hears: `vnc_sign_in.py PASSWORD COMMAND...`.

Prints in JSON which ways to sign in the server names (RFC 6143: 1 is none at all, 2 the password), and whether it lets
in whoever has that password. Only 2 is tried.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from io import BufferedRWPair

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes

PASSWORD = 2


def main(password: str, command: list[str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno()) as way_there:
        theirs.close()
        try:
            told = sign_in(password, ours.makefile("rwb"))
        finally:
            way_there.kill()
    print(json.dumps(told))  # noqa: T201 - what it is for


def sign_in(password: str, server: BufferedRWPair) -> dict[str, object]:
    version = server.read(12)
    tell(server, version)
    ways = list(server.read(server.read(1)[0]))
    is_let_in = None
    if PASSWORD in ways:
        tell(server, bytes([PASSWORD]))
        tell(server, answer(password, challenge=server.read(16)))
        is_let_in = int.from_bytes(server.read(4), "big") == 0
    return {"version": version.decode().strip(), "ways": ways, "is_let_in": is_let_in}


def tell(server: BufferedRWPair, message: bytes) -> None:
    server.write(message)
    server.flush()


def answer(password: str, *, challenge: bytes) -> bytes:
    """The challenge by DES, whose key is the password with the bits of each byte the other way round."""
    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in password.encode()[:8].ljust(8, b"\0"))
    # Thrice with one key is once; block by block is what the RFC says.
    once = Cipher(TripleDES(key * 3), modes.ECB()).encryptor()  # noqa: S305 - the protocol's, not ours
    return once.update(challenge) + once.finalize()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
