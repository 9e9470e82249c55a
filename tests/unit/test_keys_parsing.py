"""Reading a public key line: the known types, in one form, and nothing else."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from portal.errors import Invalid
from portal.services import keys, tenants


def line_of(key):
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def packed(*fields):
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def line_with(kind, *fields):
    return f"{kind} {base64.b64encode(packed(kind.encode(), *fields)).decode()}"


POINT = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(
    Encoding.X962, PublicFormat.UncompressedPoint
)  # fmt: skip
ED25519 = ed25519.Ed25519PrivateKey.generate()
SK_ED25519 = line_with(
    "sk-ssh-ed25519@openssh.com", ED25519.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw), b"ssh:"
)
SK_ECDSA = line_with("sk-ecdsa-sha2-nistp256@openssh.com", b"nistp256", POINT, b"ssh:work")


READ = [
    (line_of(ED25519), "ssh-ed25519", 256),
    (line_of(ec.generate_private_key(ec.SECP256R1())), "ecdsa-sha2-nistp256", 256),
    (line_of(ec.generate_private_key(ec.SECP384R1())), "ecdsa-sha2-nistp384", 384),
    (line_of(ec.generate_private_key(ec.SECP521R1())), "ecdsa-sha2-nistp521", 521),
    (line_of(rsa.generate_private_key(65537, 2048)), "ssh-rsa", 2048),
    (SK_ED25519, "sk-ssh-ed25519@openssh.com", 256),
    (SK_ECDSA, "sk-ecdsa-sha2-nistp256@openssh.com", 256),
]


@pytest.mark.parametrize(("line", "kind", "bits"), READ, ids=[kind for _line, kind, _bits in READ])
def test_each_known_type_is_read_and_kept_without_its_comment(line, kind, bits):
    key = keys.parse(f"  {line} carol@laptop with `a comment`\n")
    assert (key.type, key.bits, key.line) == (kind, bits, line)
    blob = base64.b64decode(line.split()[1])
    expected = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    assert key.fingerprint == f"SHA256:{expected}"


def test_the_fingerprint_is_the_one_that_openssh_shows():
    """What `ssh-keygen -lf` of OpenSSH 9.2 printed for this key."""
    line = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEgked3q358mqPlTatfYryrSKuatJNMDBTZMfMRn8yTN"
    assert keys.parse(line).fingerprint == "SHA256:rOPMNgpyyz4feaI36hQKHgkE2HZBFSUF6izmEZsv+Bc"


def dsa_line():
    numbers = dsa.generate_private_key(1024).public_key().public_numbers()  # noqa: S505 - weak on purpose
    parts = (numbers.parameter_numbers.p, numbers.parameter_numbers.q, numbers.parameter_numbers.g, numbers.y)
    return line_with("ssh-dss", *(part.to_bytes(part.bit_length() // 8 + 1, "big") for part in parts))


GOOD = line_of(ED25519)
BLOB = base64.b64decode(GOOD.split()[1])


def ed25519_line(blob):
    return f"ssh-ed25519 {base64.b64encode(blob).decode()}"


def rsa_line_with_padded_modulus():
    numbers = rsa.generate_private_key(65537, 2048).public_key().public_numbers()
    return line_with("ssh-rsa", b"\x01\x00\x01", b"\x00\x00" + numbers.n.to_bytes(256, "big"))


REFUSED = [
    ("", "Begin with the type"),
    ("ssh-ed25519", "cannot be read"),
    (f'command="rm -rf /" {GOOD}', "no options"),
    (f"no-pty {GOOD}", "no options"),
    (f"{GOOD}\n{GOOD}", "one line"),
    (f"{GOOD}\r{GOOD}", "one line"),
    (f"{GOOD} comment\nssh-rsa AAAA", "one line"),
    (f"{GOOD}\x00", "one line"),
    (f"{GOOD} \u2028x", "one line"),
    (dsa_line(), "Begin with the type"),
    (line_of(rsa.generate_private_key(65537, 1024)), "1024 bits"),  # noqa: S505 - weak on purpose
    (rsa_line_with_padded_modulus(), "damaged"),
    (f"ssh-rsa {GOOD.split()[1]}", "damaged"),
    (GOOD.replace("ssh-ed25519 ", "ssh-ed25519-cert-v01@openssh.com "), "Begin with the type"),
    (ed25519_line(BLOB + b"more"), "damaged"),
    (ed25519_line(BLOB[:-1]), "damaged"),
    (ed25519_line(b""), "damaged"),
    ("ssh-ed25519 $(reboot)", "base64"),
    ("ssh-ed25519 AAAA*", "base64"),
    (line_with("sk-ssh-ed25519@openssh.com", b"x" * 32, b"https://example.org"), "other than SSH"),
    (line_with("sk-ssh-ed25519@openssh.com", b"x" * 31, b"ssh:"), "damaged"),
    (line_with("sk-ssh-ed25519@openssh.com", b"x" * 32, b"ssh:", b"more"), "damaged"),
    (line_with("sk-ecdsa-sha2-nistp256@openssh.com", b"nistp256", b"\x04" + b"x" * 64, b"ssh:"), "damaged"),
    ("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA", "private key"),
    ("ssh-ed25519 " + "A" * 20000, "too long"),
]  # fmt: skip


# Numbered: the keys are new each time, and every worker must find the same tests.
@pytest.mark.parametrize(("line", "why"), REFUSED, ids=range(len(REFUSED)))
def test_everything_else_is_refused_with_its_reason(line, why):
    with pytest.raises(Invalid, match=why) as refused:
        keys.parse(line)
    assert list(refused.value.fields) == ["key"]


@given(st.text(max_size=200))
def test_no_text_at_all_breaks_the_reader(text):
    for line in (text, f"ssh-ed25519 {text}", f"{GOOD} {text}"):
        try:
            assert keys.parse(line).line.count("\n") == 0
        except Invalid:
            continue


@given(st.binary(max_size=300), st.sampled_from(keys.TYPES))
def test_no_bytes_at_all_break_the_reader(blob, kind):
    for body in (blob, packed(kind.encode()) + blob):
        try:
            keys.parse(f"{kind} {base64.b64encode(body).decode()}")
        except Invalid:
            continue


def test_who_logs_in_is_who_may_use_the_tenants_machines():
    assert set(keys._ROLES_THAT_LOG_IN) == set(tenants.roles_with("use"))
