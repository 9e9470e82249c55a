"""Taking files away and putting them back, on ground that a tenant may have prepared."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remotegpu_agent.cleaning import remove
from remotegpu_agent.observe import files, mounts


def test_a_tree_is_removed_with_everything_in_it(tmp_path: Path) -> None:
    (tmp_path / "left" / "deep").mkdir(parents=True)
    (tmp_path / "left" / "deep" / "file").write_text("left")
    os.mkfifo(tmp_path / "left" / "pipe")
    assert list(remove.remove(str(tmp_path / "left"))) == [f"removed {tmp_path / 'left'}"]
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("his")
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "folder").symlink_to(tmp_path / "precious")
    (tmp_path / "left" / "file").symlink_to(tmp_path / "precious" / "file")
    list(remove.remove(str(tmp_path / "left")))
    assert (tmp_path / "precious" / "file").read_text() == "his"
    assert not (tmp_path / "left").exists()


def test_a_folder_on_the_way_that_has_become_a_link_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("his")
    (tmp_path / "way").symlink_to(tmp_path / "precious")
    said = list(remove.remove(str(tmp_path / "way" / "file")))
    assert "could not reach" in said[0]
    assert (tmp_path / "precious" / "file").read_text() == "his"


def test_a_tree_deeper_than_any_path_is_removed(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deeper", dir_fd=folder)
        inner = os.open("deeper", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    assert list(remove.remove(str(tmp_path / "deeper"))) == [f"removed {tmp_path / 'deeper'}"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_mounted_on_is_left_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "left" / "mount").mkdir(parents=True)
    monkeypatch.setattr(mounts, "points", lambda: frozenset({str(tmp_path / "left" / "mount")}))
    said = list(remove.remove(str(tmp_path / "left")))
    assert f"left {tmp_path}/left/mount: something is mounted on it" in said
    assert (tmp_path / "left" / "mount").is_dir()
    assert f"removed {tmp_path / 'left'}" not in said


def test_what_is_gone_already_is_no_error(tmp_path: Path) -> None:
    assert list(remove.remove(str(tmp_path / "gone" / "file"))) == []


def kept(path: Path) -> files.Entry:
    entry = files.look_at(str(path), content=True)
    assert entry is not None
    return entry


def test_a_changed_file_gets_its_bytes_mode_and_owner_back(tmp_path: Path) -> None:
    path = tmp_path / "sudoers"
    path.write_bytes(b"root ALL\n\xff")
    path.chmod(0o440)
    before = kept(path)
    path.unlink()
    path.write_text("everybody ALL")
    list(remove.put_back(str(path), before))
    assert files.same(files.look_at(str(path)), before)
    assert path.read_bytes() == b"root ALL\n\xff"


def test_a_file_replaced_by_a_link_is_put_back_and_the_links_target_is_untouched(tmp_path: Path) -> None:
    path, target = tmp_path / "profile", tmp_path / "precious"
    path.write_text("good\n")
    before = kept(path)
    path.unlink()
    target.write_text("his")
    path.symlink_to(target)
    list(remove.put_back(str(path), before))
    assert (path.read_text(), path.is_symlink(), target.read_text()) == ("good\n", False, "his")


def test_a_removed_folder_and_a_removed_link_come_back(tmp_path: Path) -> None:
    folder, link = tmp_path / "conf.d", tmp_path / "link"
    folder.mkdir(mode=0o750)
    link.symlink_to("conf.d")
    entries = {path: kept(path) for path in (folder, link)}
    link.unlink()
    folder.rmdir()
    for path, entry in entries.items():
        list(remove.put_back(str(path), entry))
    assert all(files.same(files.look_at(str(path)), entry) for path, entry in entries.items())


def test_what_the_baseline_has_only_as_a_digest_is_left_and_told(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("secret")
    before = files.look_at(str(path))
    assert before is not None
    path.write_text("other")
    assert list(remove.put_back(str(path), before)) == [f"cannot put back {path}: the baseline has no content of it"]
    assert path.read_text() == "other"


def test_a_mode_alone_is_put_back_without_touching_the_content(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_text("#!")
    before = files.look_at(str(path))
    assert before is not None
    path.chmod(0o4755)
    number = path.stat().st_ino
    list(remove.put_back(str(path), before))
    assert files.same(files.look_at(str(path)), before)
    assert path.stat().st_ino == number
