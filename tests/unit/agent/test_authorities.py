"""Whom a host trusts: what a tenant with root has added is named by both looks, and an upgrade is no tenant."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent import baseline, verify
from remotegpu_agent.cleaning import restored, settings
from remotegpu_agent.cleaning.step import Step
from remotegpu_agent.observe import authorities, packages
from remotegpu_agent.observe.tools import ToolFailed, run
from tests.unit.agent.test_cleaning import SCOPE, SECTIONS


def pem(name: str, label: str = "CERTIFICATE") -> str:
    return f"-----BEGIN {label}-----\n{base64.encodebytes(name.encode() * 9).decode()}-----END {label}-----\n"


def fingerprint(name: str) -> str:
    return hashlib.sha256(name.encode() * 9).hexdigest()


class Store:
    """A host's trust store in a folder: two packaged authorities, one deselected, one of the operator's own."""

    def __init__(self, top: Path) -> None:
        self.certs, self.local = top / "certs", top / "local"
        self.packaged, self.dpkg, self.openssl = top / "packaged", top / "dpkg", top / "openssl"
        for folder in (self.certs, self.local, self.packaged, self.dpkg, self.openssl):
            folder.mkdir()
        self.conf, self.bundle = top / "ca-certificates.conf", self.certs / "ca-certificates.crt"
        self.certs_link, self.file_link = self.openssl / "certs", self.openssl / "cert.pem"
        self.certs_link.symlink_to(self.certs)
        (self.local / "corp.crt").write_text(pem("corp"))
        (self.certs / "own.pem").write_text(pem("own"))
        self.install({"one": pem("one"), "two": pem("two"), "three": pem("three")})
        self.select("one.crt", "two.crt", "!three.crt")
        self.rebuild()

    def install(self, certificates: dict[str, str]) -> None:
        """As dpkg does: the package's files, and its own word for what is in them."""
        for path in self.packaged.iterdir():
            path.unlink()
        for name, text in certificates.items():
            (self.packaged / f"{name}.crt").write_text(text)
        said = {
            f"{self.packaged}/{name}.crt": hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
            for name, text in certificates.items()
        }
        listing = "".join(f"{digest}  {path[1:]}\n" for path, digest in said.items())
        (self.dpkg / "ca-certificates.md5sums").write_text(listing)

    def select(self, *lines: str) -> None:
        self.conf.write_text("# which\n" + "".join(f"{line}\n" for line in lines))

    def rebuild(self) -> None:
        """As `update-ca-certificates --fresh` does."""
        for path in self.certs.iterdir():
            if path.is_symlink() and (not path.is_file() or str(path.resolve().parent) != str(self.certs)):
                path.unlink()
        chosen = [self.packaged / name for name in authorities.chosen(self.conf.read_bytes())]
        paths = [path for path in [*chosen, *sorted(self.local.glob("*.crt"))] if path.is_file()]
        for path in paths:
            self.link(f"{path.stem}.pem", str(path))
            self.link(f"{hashlib.sha256(path.stem.encode()).hexdigest()[:8]}.0", f"{path.stem}.pem")
        new = self.certs / "new"
        new.write_text("".join(path.read_text() for path in paths))
        new.replace(self.bundle)

    def link(self, name: str, target: str) -> None:
        path = self.certs / name
        path.unlink(missing_ok=True)
        path.symlink_to(target)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store(tmp_path)
    ways = {str(made.certs_link): str(made.certs), str(made.file_link): str(made.bundle)}
    for name, path in (
        ("STORE", made.certs), ("BUNDLE", made.bundle), ("SELECTION", made.conf), ("OFFERED", made.packaged),
        ("LOCAL", made.local),
    ):  # fmt: skip
        monkeypatch.setattr(authorities, name, str(path))
    monkeypatch.setattr(packages, "INFO", str(made.dpkg))
    monkeypatch.setattr(authorities, "OPENSSL", ways)
    monkeypatch.setattr(baseline, "ENROLL_TOKEN", str(tmp_path / "enroll-token"))
    # Of the whole of /etc somebody else tells.
    monkeypatch.setattr(restored, "look_for_changes", lambda _section: lambda _scope: iter(()))
    monkeypatch.setattr(verify, "_files", lambda _section: lambda _asked: iter(()))

    def answer(argv: list[str], **how: Any) -> str:
        if argv[:2] == ["dpkg", "-S"]:
            return "".join(f"ca-certificates: {path}\n" for path in made.packaged.iterdir())
        if argv[0] == "dpkg-query":
            return (made.dpkg / "ca-certificates.md5sums").read_text()
        return run(argv, **how)

    def rebuild(argv: list[str], **_: Any) -> str:
        assert argv == ["update-ca-certificates", "--fresh"]
        made.rebuild()
        return ""

    monkeypatch.setattr(verify, "run", answer)
    monkeypatch.setattr(settings, "run", rebuild)
    return made


class Looks:
    """Both looks at a store, with a baseline of it as it was."""

    def __init__(self) -> None:
        sections = {
            "authorities": authorities.take(),
            "authority_files": authorities.read_files(lambda path: not Path(path).is_symlink()),
        }
        self.scope = replace(SCOPE, sections=SECTIONS | sections)
        self.asked = verify.Asked(None, None, None, sections)

    def named(self) -> list[str]:
        """The paths that are named; both looks must name the same."""
        before_cleaning = {finding.text.split()[0] for finding in settings.look_for_settings(self.scope)}
        assert {text.split()[0] for text in verify._settings(self.asked)} == before_cleaning
        return sorted(before_cleaning)

    def clean(self) -> dict[str, Any]:
        return Step("etc", settings.look_for_settings, settings.put_back_settings).run(self.scope, before=None)


# --- what a tenant with root has done


def adds_his_own(store: Store) -> list[Path]:
    (store.local / "left.crt").write_text(pem("left"))
    store.rebuild()
    by_hash = next(path for path in store.certs.glob("*.0") if str(path.readlink()) == "left.pem")
    return [store.local / "left.crt", store.bundle, store.certs / "left.pem", by_hash]


def appends_to_the_bundle(store: Store) -> list[Path]:
    with store.bundle.open("a") as file:
        file.write(pem("left"))
    return [store.bundle]


def appends_what_openssl_alone_takes(store: Store) -> list[Path]:
    with store.bundle.open("a") as file:
        file.write(pem("one", "TRUSTED CERTIFICATE"))
    return [store.bundle]


def puts_a_file_under_a_hash(store: Store) -> list[Path]:
    (store.certs / "0badf00d.0").write_text(pem("left"))
    return [store.certs / "0badf00d.0"]


def leads_a_hash_elsewhere(store: Store) -> list[Path]:
    (store.openssl / "left.pem").write_text(pem("one"))  # known today, and another tomorrow
    store.link("0badf00d.0", str(store.openssl / "left.pem"))
    return [store.certs / "0badf00d.0"]


def leads_a_hash_to_what_no_package_brought(store: Store) -> list[Path]:
    (store.packaged / "left.crt").write_text(pem("left"))
    store.link("0badf00d.0", f"{store.packaged}/left.crt")
    return [store.certs / "0badf00d.0"]


def leads_a_hash_out_by_way_of_a_folder(store: Store) -> list[Path]:
    (store.openssl / "left.pem").write_text(pem("one"))
    store.link("0badf00d.0", f"{store.packaged}/../openssl/left.pem")
    return [store.certs / "0badf00d.0"]


def waits_for_the_next_upgrade(store: Store) -> list[Path]:
    """Debian's tool appends to this and moves it into place."""
    Path(f"{store.bundle}.new").write_text(pem("left"))
    return [Path(f"{store.bundle}.new")]


def selects_what_the_operator_does_not_want(store: Store) -> list[Path]:
    store.link("three.pem", f"{store.packaged}/three.crt")
    return [store.certs / "three.pem"]


def changes_the_operators_own(store: Store) -> list[Path]:
    (store.certs / "own.pem").write_text(pem("left"))
    return [store.certs / "own.pem"]


def takes_one_away(store: Store) -> list[Path]:
    store.bundle.write_text(pem("one") + pem("corp"))
    return [store.bundle]


def takes_the_names_of_hashes_away(store: Store) -> list[Path]:
    for path in store.certs.glob("*.0"):
        path.unlink()
    return [store.certs]


def sends_the_bundle_elsewhere(store: Store) -> list[Path]:
    store.bundle.replace(store.openssl / "bundle")
    store.bundle.symlink_to(store.openssl / "bundle")
    return [store.bundle]


def sends_openssl_elsewhere(store: Store) -> list[Path]:
    store.certs_link.unlink()
    store.certs_link.symlink_to(store.openssl)
    return [store.certs_link]


def gives_openssl_a_bundle_of_his(store: Store) -> list[Path]:
    store.file_link.write_text(pem("left"))
    return [store.file_link]


WAYS = (
    adds_his_own, appends_to_the_bundle, appends_what_openssl_alone_takes, puts_a_file_under_a_hash,
    leads_a_hash_elsewhere, leads_a_hash_to_what_no_package_brought, leads_a_hash_out_by_way_of_a_folder,
    waits_for_the_next_upgrade, selects_what_the_operator_does_not_want, changes_the_operators_own, takes_one_away,
    takes_the_names_of_hashes_away, sends_the_bundle_elsewhere, sends_openssl_elsewhere, gives_openssl_a_bundle_of_his,
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_a_tenant_did_to_the_authorities_is_named_by_both_looks_and_undone(
    store: Store, way: Callable[[Store], list[Path]]
) -> None:
    looks, trusted = Looks(), store.bundle.read_text()
    assert looks.named() == []
    wanted = sorted(map(str, way(store)))
    assert looks.named() == wanted
    cleaned = looks.clean()
    assert (cleaned["result"], cleaned["reason"]) == ("passed", None)
    assert looks.named() == []
    assert (store.bundle.read_text(), store.bundle.is_symlink()) == (trusted, False)
    assert (store.certs_link.readlink(), (store.certs / "own.pem").read_text()) == (store.certs, pem("own"))
    assert looks.clean()["acted"] == []


def test_a_packaged_certificate_that_was_replaced_fails_by_its_name_and_is_left_to_an_operator(store: Store) -> None:
    """The baseline has no content of it, and the package's own word for it does not fit."""
    looks = Looks()
    (store.packaged / "two.crt").write_text(pem("left"))
    store.rebuild()
    cleaned = looks.clean()
    said = f"{store.bundle} trusts a certificate that is not in the baseline (SHA-256 {fingerprint('left')})"
    assert (cleaned["result"], said in cleaned["reason"]) == ("failed", True)
    assert str(store.bundle) in looks.named()
    store.install({"one": pem("one"), "two": pem("two"), "three": pem("three")})
    assert looks.clean()["result"] == "passed"


def test_where_the_list_cannot_be_made_anew_the_step_fails(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks()
    appends_to_the_bundle(store)

    def is_not_there(argv: list[str], **_: Any) -> str:
        raise ToolFailed(f"{argv[0]} is not installed")

    monkeypatch.setattr(settings, "run", is_not_there)
    cleaned = looks.clean()
    assert (cleaned["result"], "update-ca-certificates is not installed" in cleaned["acted"][-1]) == ("failed", True)


# --- what is no tenant's


def upgrade(store: Store) -> None:
    """One authority is withdrawn, two are brought, and the selection is rewritten."""
    store.install({"one": pem("one"), "three": pem("three"), "four": pem("four"), "five": pem("five")})
    store.select("one.crt", "!two.crt", "!three.crt", "four.crt", "five.crt")


def test_an_upgrade_of_the_distributions_authorities_is_not_taken_for_a_tenant(store: Store) -> None:
    looks = Looks()
    upgrade(store)
    assert looks.named() == [], "while dpkg is at it, the list is still the old one"
    store.rebuild()
    store.file_link.symlink_to(store.bundle)  # an upgrade of openssl has brought this one
    assert looks.named() == []
    assert (looks.clean()["acted"], pem("four") in store.bundle.read_text()) == ([], True)
    appends_to_the_bundle(store)
    assert looks.clean()["result"] == "passed"
    assert store.bundle.read_text() == "".join(map(pem, ("one", "four", "five", "corp")))


def test_an_upgrade_passes_also_once_its_selection_was_put_back_and_the_list_made_anew(store: Store) -> None:
    looks, before = Looks(), store.conf.read_text()
    upgrade(store)
    store.rebuild()
    store.conf.write_text(before)
    assert (looks.named(), looks.clean()["acted"]) == ([], [])
    store.rebuild()
    assert looks.named() == []
    assert store.bundle.read_text() == pem("one") + pem("corp")


def test_a_certificate_of_the_tenants_is_named_beside_those_that_an_upgrade_has_brought(store: Store) -> None:
    looks = Looks()
    upgrade(store)
    (store.packaged / "left.crt").write_text(pem("left"))
    store.select("one.crt", "four.crt", "five.crt", "left.crt")
    store.rebuild()
    assert [finding.text for finding in settings._authorities(looks.scope) if "crt trusts" in finding.text] == [
        f"{store.bundle} trusts a certificate that is not in the baseline (SHA-256 {fingerprint('left')})"
    ]
    assert str(store.bundle) in looks.named()


def test_a_bundle_that_an_operator_wrote_by_hand_is_his_until_an_update_takes_it(store: Store) -> None:
    appends_to_the_bundle(store)
    looks = Looks()
    assert looks.named() == []
    store.rebuild()
    assert looks.named() == []


def test_a_baseline_that_is_older_tells_of_no_authorities(store: Store) -> None:
    adds_his_own(store)
    assert list(settings.look_for_settings(SCOPE)) == []
    assert list(verify._settings(verify.Asked(None, None, None, {}))) == []


def test_a_host_without_a_store_differs_in_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STORE", "LOCAL", "OFFERED", "SELECTION"):
        monkeypatch.setattr(authorities, name, f"{store.certs}/none")
    monkeypatch.setattr(packages, "INFO", f"{store.certs}/none")
    monkeypatch.setattr(authorities, "OPENSSL", {})
    assert authorities.take() == {"bundle": [], "by_hash": [], "others": [], "offered": []}
    assert Looks().named() == []


# --- what is read


def test_nothing_in_the_store_holds_up_a_look(store: Store) -> None:
    looks = Looks()
    os.mkfifo(store.packaged / "pipe")
    store.link("00000001.0", f"{store.packaged}/pipe")
    store.link("00000002.0", "00000002.0")
    store.link("00000003.0", "gone.pem")
    assert looks.named() == [], "there is nobody to trust in them"


def test_a_certificate_is_known_by_its_fingerprint_wherever_it_stands() -> None:
    both = f"Certificate:\n  Data: …\n{pem('one')}\r\n# and\n{pem('two').replace(chr(10), chr(13) + chr(10))}"
    assert authorities.fingerprints(both.encode()) == {fingerprint("one"), fingerprint("two")}
    assert authorities.fingerprints(b"-----BEGIN DH PARAMETERS-----\nAAAA\n-----END DH PARAMETERS-----\n") == set()


@pytest.mark.parametrize(
    "text",
    [
        pem("one", "X509 CERTIFICATE"),
        pem("one", "TRUSTED CERTIFICATE"),
        pem("one").replace("-----\n", "-----\nProc-Type: 4\n\n", 1),
        re.sub("-----END.*", "", pem("one")) + "AAAA",
        "x" * (authorities.LARGEST_BYTES + 1),
    ],
)
def test_what_is_written_in_another_way_is_no_certificate_that_is_known(text: str) -> None:
    (other,) = authorities.fingerprints(text.encode())
    assert other != fingerprint("one")


# --- a token that would enrol the agent anew


def test_a_token_that_lies_there_is_named_and_taken_away(store: Store) -> None:
    token = Path(baseline.ENROLL_TOKEN)
    token.write_text("left\n")
    looks = Looks()
    assert looks.named() == [str(token)]
    assert (looks.clean()["result"], token.exists(), looks.named()) == ("passed", False, [])
