"""Files in a shared folder: what someone else left there is neither followed nor waited for."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import threading
from pathlib import Path

import pytest

from delib_fast import files
from delib_fast.files import (
    AppendFile,
    FileLock,
    open_regular,
    read_text,
    remove_temporary_files,
    remove_tree,
    replace_folder,
    write_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- writing ------------------------------------------------------------------------------------------------


def plant_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def plant_hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def plant_pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("plant", [plant_link, plant_hard_link, plant_pipe])
@pytest.mark.parametrize("name", [".ledger.json.tmp", "ledger.json.tmp", "ledger.json"])
def test_a_planted_file_is_neither_followed_nor_waited_for(tmp_path, name, plant):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    folder.mkdir()
    plant(folder / name, victim)
    write_atomic(folder / "ledger.json", "ours")
    assert victim.read_text() == "precious"
    found = os.lstat(folder / "ledger.json")
    assert stat.S_ISREG(found.st_mode)
    assert (found.st_nlink, (folder / "ledger.json").read_text()) == (1, "ours")


def test_the_temporary_name_is_random(tmp_path, monkeypatch):
    seen = []
    plain = os.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (seen.append(self.name), plain(self, to)))
    for _ in range(2):
        write_atomic(tmp_path / "a", "x")
    assert all(re.fullmatch(r"\.a\.\d{12}\.tmp", name) for name in seen)
    assert len(set(seen)) == 2


def test_new_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_what_a_killed_writer_left_is_deleted_and_what_a_living_one_writes_is_not(tmp_path):
    dead, living = tmp_path / ".a.000000000001.tmp", tmp_path / ".a.000000000002.tmp"
    for path in (dead, living):
        path.write_text("half")
    with living.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomic(tmp_path / "a", "x")
        assert names(tmp_path) == [living.name, "a"]
    write_atomic(tmp_path / "a", "y")
    assert names(tmp_path) == ["a"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", "old")

    def fails(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fails)
        with pytest.raises(OSError, match="No space left"):
            write_atomic(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_many_writers_at_the_same_time(tmp_path):
    """Each write is whole; no writer takes the file of another for abandoned."""
    errors = []

    def write(n: int) -> None:
        try:
            for _ in range(40):
                write_atomic(tmp_path / "a", str(n) * 1000)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() in {str(n) * 1000 for n in range(4)}


def test_leftovers_may_be_of_any_kind(tmp_path):
    (tmp_path / ".a.tmp").mkdir()
    (tmp_path / ".b.tmp").symlink_to("nowhere")
    os.mkfifo(tmp_path / ".c.tmp")
    remove_temporary_files(tmp_path)
    assert not names(tmp_path)


def test_a_link_to_a_folder_is_deleted_and_not_the_folder(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("x")
    (tmp_path / "link").symlink_to("precious")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "missing")
    assert names(tmp_path) == ["precious"]
    remove_tree(tmp_path / "precious")
    assert not names(tmp_path)


def test_a_folder_is_not_written_into_a_planted_one(tmp_path):
    """The names that the project used before, and a link in the place of the folder itself."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (f".model.writing-{os.getpid()}", f".model.old-{os.getpid()}", "model"):
        (tmp_path / name).symlink_to(outside)
    replace_folder(tmp_path / "model", lambda folder: (folder / "a").write_text("x"))
    assert not names(outside)
    assert names(tmp_path) == ["model", "outside"]
    assert not (tmp_path / "model").is_symlink()
    assert names(tmp_path / "model") == ["a"]


# --- appending ----------------------------------------------------------------------------------------------


def test_a_line_after_one_that_was_cut_off(tmp_path):
    (tmp_path / "a").write_text("whole\nha")
    file = AppendFile(tmp_path / "a")
    file.write_line("next")
    file.close()
    assert (tmp_path / "a").read_text() == "whole\nha\nnext\n"


def test_nothing_is_appended_to_what_a_link_names(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a").symlink_to("victim")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        AppendFile(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a named pipe, not a regular file"):
        AppendFile(tmp_path / "pipe")
    assert (tmp_path / "victim").read_text() == "precious"


# --- reading ------------------------------------------------------------------------------------------------


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(OSError, match="is a named pipe, not a regular file"):
            open_regular(path)
    with pytest.raises(OSError, match="is a device, not a regular file"):
        open_regular("/dev/zero")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    (tmp_path / "text").write_bytes(b"a\r\nb\rc\n")
    assert read_text(tmp_path / "text") == "a\nb\nc\n"


# --- locks --------------------------------------------------------------------------------------------------


def test_a_lock_that_another_process_holds(tmp_path):
    lock = FileLock(tmp_path / ".lock", wait=False)
    with pytest.raises(BlockingIOError):
        FileLock(tmp_path / ".lock", wait=False)
    lock.release()
    lock.release()
    FileLock(tmp_path / ".lock", wait=False).release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_another_process(tmp_path, monkeypatch, number):
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", fails)
    with pytest.raises(OSError, match="its file system gives no file locks") as caught:
        FileLock(tmp_path / ".lock", wait=False)
    assert not isinstance(caught.value, BlockingIOError)
    write_atomic(tmp_path / "a", "x")  # which needs no lock
    assert (tmp_path / "a").read_text() == "x"


def test_a_planted_lock(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to("victim")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=r"symbolic links|is a named pipe"):
            FileLock(tmp_path / name, wait=False)
