"""The first words of RDP: what a server lets be spoken, and its certificate's SHA-256.

`rdp_hello.py ADDRESS PORT` prints JSON. `security` is "tls", "rdp" (RDP's own, without a certificate) or "refused",
asked once with TLS offered and once without.
"""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import struct
import sys

RDP, TLS = 0, 1


def ask(end: tuple[str, int], protocols: int) -> tuple[str, str | None]:
    """X.224 connection request with an RDP negotiation request; see [MS-RDPBCGR] 2.2.1.1 and 2.2.1.2."""
    with socket.create_connection(end, timeout=15) as connection:
        negotiation = struct.pack("<BBHI", 1, 0, 8, protocols)
        request = struct.pack(">BBHHB", 6 + len(negotiation), 0xE0, 0, 0, 0) + negotiation
        connection.sendall(struct.pack(">BBH", 3, 0, 4 + len(request)) + request)
        answer = connection.recv(64)
        if len(answer) < 19 or answer[11] != 2:
            return "refused", None
        if struct.unpack("<I", answer[15:19])[0] != TLS:
            return "rdp", None
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with context.wrap_socket(connection) as spoken:
            return "tls", hashlib.sha256(spoken.getpeercert(binary_form=True) or b"").hexdigest()


def main() -> None:
    end = (sys.argv[1], int(sys.argv[2]))
    (security, certificate), (without, _) = ask(end, TLS), ask(end, RDP)
    print(json.dumps({"security": security, "without_tls": without, "certificate_sha256": certificate}))  # noqa: T201


if __name__ == "__main__":
    main()
