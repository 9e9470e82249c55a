"""Signed reports: anybody can check one with the public key alone, and one changed byte is seen."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from portal.cli import main
from portal.services import config, reports
from portal.services.reports import NotGenuine
from portal.settings import Settings
from tests.support.rental import ensure_signing_key

CONTENT = {
    "result": "passed",
    "reasons": [],
    "level": "tidy",
    "machine": {"id": 1, "name": "gpu-1"},
    "lease": {"id": 17},
    "reclaim": {"id": 3, "number": 1, "ended_at": "2026-03-01T12:00:00.000Z"},
    "cleaning": {"steps": [{"id": "home", "duration_s": 0.25, "after": None, "said": "aufgeräumt 清理"}]},
}


@pytest.fixture
def file(settings: Settings, tmp_path: Path) -> Path:
    """A signed report on disk; its public key lies beside it."""
    config.use(settings)
    ensure_signing_key()
    (tmp_path / "key.pem").write_text(reports.public_key_pem())
    path = tmp_path / "report.json"
    path.write_text(reports.file_of(reports.sign(CONTENT)))
    return path


def check(file: Path) -> int:
    return main(["verify-report", str(file), "--public-key", str(file.parent / "key.pem")])


def test_a_genuine_report_is_recognised_and_summed_up(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(file) == 0
    told = capsys.readouterr().out
    assert "Genuine" in told
    assert "Machine gpu-1 (1) after lease 17: passed." in told


def test_file_and_public_key_alone_are_enough(file: Path) -> None:
    """Somebody else's machine: no settings, no secrets, no database, and none of them is made."""
    argv = [sys.executable, "-m", "portal", "verify-report", file.name, "--public-key", "key.pem"]
    bare, before = {"PYTHONPATH": str(Path(__file__).parents[2])}, sorted(file.parent.iterdir())
    genuine = subprocess.run(argv, cwd=file.parent, env=bare, capture_output=True, text=True)
    file.write_bytes(file.read_bytes().replace(b"passed", b"passet", 1))
    forged = subprocess.run(argv, cwd=file.parent, env=bare, capture_output=True, text=True)
    assert [(said.returncode, said.stdout.split(maxsplit=1)[0]) for said in (genuine, forged)] == [
        (0, "Genuine,"),
        (1, "NOT"),
    ]
    assert sorted(file.parent.iterdir()) == before


def test_the_signature_covers_the_canonical_text_byte_for_byte(settings: Settings, file: Path) -> None:
    text = '{"a":[1,2.5,null,true],"b":"清理"}'
    signed = reports.sign({"b": "清理", "a": [1, 2.5, None, True]})
    assert signed.text == text
    key = reports.load_public_key(file.parent / "key.pem")
    key.verify(base64.b64decode(signed.signature), text.encode())


def test_any_changed_byte_is_seen(file: Path) -> None:
    genuine = file.read_bytes()
    key = reports.load_public_key(file.parent / "key.pem")
    for position in range(len(genuine)):
        for change in (1, 0x20, 0x80):
            forged = bytearray(genuine)
            forged[position] ^= change
            with pytest.raises(NotGenuine):
                reports.verify(bytes(forged), key)
    assert reports.verify(genuine, key) == CONTENT


@pytest.mark.parametrize(
    "forge",
    [
        lambda data: data[:-1],
        lambda data: data + b" ",
        lambda data: data.replace(b'"passed"', b'"failed"'),
        lambda data: json.dumps(json.loads(data), indent=2).encode(),
        lambda data: data.replace(b'"result":', b'"result":"failed","result":'),
        lambda data: data.replace(b"0.25", b"0.250"),
        lambda data: b"\xff" + data,
        lambda data: json.dumps({**json.loads(data), "signature": 7}).encode(),
    ],
)
def test_a_forged_or_damaged_file_is_refused(file: Path, forge: object, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_bytes(forge(file.read_bytes()))  # type: ignore[operator]  # one of the lambdas above
    assert check(file) == 1
    assert "NOT GENUINE" in capsys.readouterr().out


@pytest.mark.parametrize("junk", [b"", b"[]", b'"report"', b"{}", b"null", b"[" * 100_000, b"\x00"])
def test_what_is_no_report_is_refused(file: Path, junk: bytes) -> None:
    with pytest.raises(NotGenuine, match="no report file"):
        reports.verify(junk, reports.load_public_key(file.parent / "key.pem"))


def test_a_report_of_another_portal_is_refused_and_both_keys_are_named(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Ed25519PrivateKey.generate().public_key()
    form = reports.serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "key.pem").write_bytes(other.public_bytes(reports.serialization.Encoding.PEM, form))
    assert check(file) == 1
    assert reports.fingerprint(other) in capsys.readouterr().out


def test_a_missing_file_or_key_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-report", str(tmp_path / "none.json"), "--public-key", str(tmp_path / "none.pem")]) == 1
    assert "Cannot check" in capsys.readouterr().out
