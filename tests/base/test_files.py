"""Files are written whole or not at all: killed, on a full disk, through links, over old ones."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from small_disk import small_disk

from tapct.base import files
from tapct.base.exits import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["Größe\n", b"\x00\xff"])
def test_a_file_holds_exactly_what_was_written(tmp_path: Path, content: bytes | str) -> None:
    (tmp_path / "a").write_text("old and longer than the new one")
    files.write_atomically(tmp_path / "a", content)
    written = (tmp_path / "a").read_bytes()
    assert written == (content.encode("utf-8") if isinstance(content, str) else content)
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path: Path, call: str) -> None:
    (tmp_path / "a.json").write_text("old")
    code = f"""
        import os, signal
        from pathlib import Path
        from tapct.base import files
        {call} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        files.write_atomically(Path({str(tmp_path / "a.json")!r}), "new")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a.json").read_text() == "old"
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["a.json"]
    files.write_atomically(tmp_path / "a.json", "next")
    assert (tmp_path / "a.json").read_text() == "next"


def test_file_and_folder_reach_the_disk_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def rename(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", rename)
    files.write_atomically(tmp_path / "a", "content")
    assert calls == ["file", "rename", "folder"]


def test_a_full_disk_is_one_clear_error_and_the_old_file_stays(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        files.write_atomically(disk / "a", b"old")
        with pytest.raises(OSError, match="no space left on the disk.*free some") as caught:
            files.write_atomically(disk / "a", bytes(1 << 20))
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(disk / "a")
        assert files.first_cause(caught.value) == "no space left on the disk"
        assert (disk / "a").read_bytes() == b"old"
        assert names(disk) == ["a"]


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        with files.replacing_folder(disk / "out") as folder:
            (folder / "part").write_bytes(b"old")
        with (
            pytest.raises(OSError, match="no space left on the disk") as caught,
            files.replacing_folder(disk / "out") as folder,
        ):
            (folder / "part").write_bytes(bytes(1 << 20))
        assert caught.value.filename == str(disk / "out")
        assert (disk / "out" / "part").read_bytes() == b"old"
        assert names(disk) == ["out"]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_beside(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(TypeError), files.replacing(tmp_path / "a") as file:
        file.writelines([b"half", 1])  # type: ignore[list-item]
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_that_is_missing_is_named_by_the_final_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        files.write_atomically(tmp_path / "none" / "a", "content")
    assert caught.value.filename == str(tmp_path / "none" / "a")
    assert "tmp" not in str(caught.value).replace(str(tmp_path), "")


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, files.replacing(tmp_path / "a"):
        (tmp_path / "other").read_bytes()
    assert caught.value.filename == str(tmp_path / "other")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        files.write_atomically(tmp_path / "file", "content")
        with files.replacing_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def test_symlinks_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("old")
    (tmp_path / "link").symlink_to(Path("elsewhere", "a"))
    files.write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "a").read_text() == "new"
    (tmp_path / "out").symlink_to("elsewhere")
    with files.replacing_folder(tmp_path / "out") as folder:
        (folder / "b").touch()
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "elsewhere") == ["b"]
    assert names(tmp_path) == ["elsewhere", "link", "out"]


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with files.replacing_folder(tmp_path / "deep" / "out") as folder:
            (folder / "below").mkdir()
            (folder / "below" / content).touch()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out" / "below") == ["second"]


def test_a_failed_rename_of_a_folder_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    replace, calls = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", second_fails)
    with pytest.raises(PermissionError), files.replacing_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_a_folder_that_cannot_be_synced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def network_file_system(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", network_file_system)
    files.write_atomically(tmp_path / "a", "content")
    assert (tmp_path / "a").read_text() == "content"


def test_sha256_is_that_of_the_whole_file(tmp_path: Path) -> None:
    content = os.urandom((2 << 20) + 17)  # several blocks and a part of one
    (tmp_path / "a").write_bytes(content)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    done = subprocess.run(["sha256sum", tmp_path / "a"], capture_output=True, text=True, check=True)
    assert files.sha256(tmp_path / "a") == done.stdout.split()[0]


def test_the_first_cause_is_the_innermost_one_without_line_breaks() -> None:
    inner, middle, outer = ValueError("the reason\nand more"), RuntimeError("b"), RuntimeError("c")
    outer.__cause__, middle.__cause__ = middle, inner
    assert files.first_cause(outer) == "ValueError: the reason"
    middle.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert files.first_cause(outer) == "no space left on the disk"


def test_a_path_is_expanded_as_a_shell_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/$me")
    monkeypatch.chdir(tmp_path)
    expected = {
        "~": "/home/me",
        "~/runs": "/home/me/runs",
        "$SCRATCH/a": "/scratch/$me/a",
        "${SCRATCH}_2": "/scratch/$me_2",
        "a~b": "a~b",
        "a$": "a$",
        "a$1": "a$1",
        "cost$$": "cost$",
        "$$HOME": "$HOME",
        "./~": "~",
    }
    assert {text: str(files.expand_path(text)) for text in expected} == expected
    for path in map(Path, ("~", "~me/a", "a$b", "$$", "a$1", "/plain")):
        assert files.expand_path(files.unexpanded(path)) == path


def test_a_path_that_cannot_be_expanded_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(UserError, match=r"environment variable NOWHERE of the path \$NOWHERE/a"):
        files.expand_path("$NOWHERE/a")
    with pytest.raises(UserError, match="no user nobody_of_this_name"):
        files.expand_path("~nobody_of_this_name/a")


def test_a_file_whose_name_holds_a_dollar_is_meant_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("b", raising=False)
    file = tmp_path / "a$b"
    file.touch()
    assert files.expand_path(file) == file
