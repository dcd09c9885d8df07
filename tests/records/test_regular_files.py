"""`open_regular` rejects pipes, devices, sockets and links to them without waiting."""

import os
import socket

import pytest

from fastguard.records.regular_files import NotRegularFile, open_regular


def test_a_regular_file_is_opened_by_its_name_and_by_a_link(tmp_path):
    (tmp_path / "epoch3.pt").write_bytes(b"weights")
    (tmp_path / "last.pt").symlink_to("epoch3.pt")
    for name in ("epoch3.pt", "last.pt"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"weights"
    with open_regular(tmp_path / "epoch3.pt", buffering=0, follow_links=False) as file:
        assert file.read(3) == b"wei"
    with pytest.raises(NotRegularFile, match="is a symbolic link, not a regular file"):
        open_regular(tmp_path / "last.pt", follow_links=False)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "a named pipe"),
        (make_socket, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
    ids=["pipe", "socket", "device"],
)
@pytest.mark.parametrize("through_a_link", [False, True], ids=["itself", "link"])
def test_other_kinds_of_files_are_an_error_without_waiting(
    tmp_path, monkeypatch, make, says, through_a_link
):
    monkeypatch.chdir(tmp_path)  # the name of a socket may be some 100 characters long
    path = tmp_path / "x"
    make(path.relative_to(tmp_path))
    if through_a_link:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotRegularFile, match=f"is {says}, not a regular file") as refused:
        open_regular(path)
    assert refused.value.filename == str(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_pipe_that_replaces_a_file_does_not_block(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"weights")
    open_now = os.open

    def swapped(name, *arguments):
        path.unlink()
        os.mkfifo(path)
        return open_now(name, *arguments)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(NotRegularFile, match="is a named pipe"):
        open_regular(path)


@pytest.mark.parametrize("name", ["mem", "pagemap", "status", "clear_refs"])
def test_a_file_of_the_system_is_an_error(tmp_path, name):
    path = tmp_path / "manifest.json"
    path.symlink_to(f"/proc/self/{name}")
    with pytest.raises(NotRegularFile, match=r"is a file of the system.*manifest\.json"):
        open_regular(path)


def test_an_empty_file_is_a_regular_file(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    with open_regular(tmp_path / "x") as file:
        assert file.read() == b""


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "raw"])
@pytest.mark.parametrize("n", [-1, 10], ids=["all", "some"])
def test_an_error_while_reading_names_the_file(tmp_path, buffering, n):
    path = tmp_path / "x"
    path.write_bytes(b"on a disk that fails")
    with open_regular(path, buffering=buffering) as file, open("/proc/self/mem", "rb") as failing:
        os.dup2(failing.fileno(), file.fileno())
        with pytest.raises(OSError, match="Input/output error") as failed:
            file.read(n)
    assert failed.value.filename == str(path)


def test_a_file_that_has_nothing_to_read_yet_is_an_error(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"")
    pipe = os.pipe()
    os.set_blocking(pipe[0], False)
    with open_regular(path) as file:
        os.dup2(pipe[0], file.fileno())
        with pytest.raises(BlockingIOError) as failed:
            file.read(10)
    assert failed.value.filename == str(path)
    for end in pipe:
        os.close(end)


def test_a_missing_file_has_its_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "x")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
