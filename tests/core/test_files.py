"""Files that may be anything: a FIFO, a device, a gigabyte, one on a file system that hangs."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from fumi_core.runtime import files
from fumi_core.runtime.files import MAX_FILE_BYTES, in_time, read_file


def test_a_regular_file_is_read_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content\n")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "file") == read_file(str(tmp_path / "link")) == b"content\n"


def test_a_file_that_is_not_regular_is_an_error_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
        for path in (tmp_path / "fifo", tmp_path / "sock", Path("/dev/zero")):
            with pytest.raises(OSError, match="it is not a regular file"):
                read_file(path)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")


def test_a_file_that_is_too_large_is_an_error_before_it_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, MAX_FILE_BYTES)
    assert len(read_file(path)) == MAX_FILE_BYTES
    os.truncate(path, 1 << 40)
    with pytest.raises(OSError, match="it is larger than 4 MiB"):
        read_file(path)


def test_a_file_access_that_hangs_times_out_and_is_not_repeated_until_it_has_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FILE_TIMEOUT", 0.05)
    answer, calls = threading.Event(), []

    def hang() -> None:
        calls.append(1)
        answer.wait()

    for _ in range(3):
        with pytest.raises(TimeoutError, match="the file system may hang"):
            in_time("/nfs", hang)
    assert len(calls) == 1
    assert in_time("/elsewhere", lambda: 1) == 1
    thread = files._hanging["/nfs"]
    answer.set()
    thread.join()
    assert in_time("/nfs", lambda: 2) == 2


def test_so_many_may_hang_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FILE_TIMEOUT", 0.01)
    answer = threading.Event()
    for number in range(files.MAX_HANGING_THREADS):
        with pytest.raises(TimeoutError):
            in_time(f"/nfs/{number}", answer.wait)
    before = threading.active_count()
    with pytest.raises(TimeoutError):
        in_time("/nfs/more", answer.wait)
    assert threading.active_count() == before
    threads = list(files._hanging.values())
    answer.set()
    for thread in threads:
        thread.join()
    assert in_time("/nfs/more", lambda: 1) == 1
