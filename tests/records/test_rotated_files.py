"""Reading while a writer rotates gives all records in order, for any timing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import fastguard.records.rotated_files as listing
from guardtest.rotation import ROTATIONS, Rotation


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "r.jsonl"


def read(path: Path) -> list[int]:
    return [int(line) for _, file in listing.open_run(path) for line in file]


@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_a_rotation_while_listing_leaves_no_gap(
    path: Path, monkeypatch: pytest.MonkeyPatch, rotation: Rotation
) -> None:
    path.with_name("r.1.jsonl").write_text("1\n")
    path.write_text("2\n3\n")
    rotation.comes(monkeypatch, path)
    seen = read(path)
    assert seen == list(range(1, len(seen) + 1)) and len(seen) >= 3


@pytest.mark.parametrize("missed", ["ours", "one after ours"])
def test_a_listing_that_misses_a_file_is_repeated(
    path: Path, monkeypatch: pytest.MonkeyPatch, missed: str
) -> None:
    """A listing made while a file is renamed may miss both of its names."""
    real, looks = listing.rotated_files, []
    path.with_name("r.1.jsonl").write_text("1\n")
    path.write_text("2\n")

    def rotated_files(name: Path) -> list[Path]:
        looks.append(1)
        if len(looks) == 2:
            path.rename(path.with_name("r.2.jsonl"))
            path.with_name("r.3.jsonl").write_text("3\n")
            path.with_name("r.4.jsonl").write_text("4\n")
            path.write_text("5\n")
            hidden = "r.2.jsonl" if missed == "ours" else "r.3.jsonl"
            return [p for p in real(name) if p.name != hidden]
        return real(name)

    monkeypatch.setattr(listing, "rotated_files", rotated_files)
    assert read(path) == [1, 2, 3, 4]  # all records at the time of the listing


def test_a_file_deleted_by_hand_does_not_stop_reading(path: Path) -> None:
    for number in (1, 2, 5, 6):
        path.with_name(f"r.{number}.jsonl").write_text(f"{number}\n")
    path.write_text("7\n")
    assert read(path) == [1, 2, 5, 6, 7]


def test_names_without_a_number_are_not_files_of_the_run(path: Path) -> None:
    for name in ("r.².jsonl", "r.٣.jsonl", "r.-1.jsonl", "r.1.2.jsonl", "r..jsonl", "r.1.json"):
        path.with_name(name).write_text("bad")
    path.with_name("r.010.jsonl").write_text("10\n")
    path.with_name("r.9.jsonl").write_text("9\n")
    path.write_text("11\n")
    assert read(path) == [9, 10, 11]


def test_a_folder_with_such_a_name_is_not_a_file_of_the_run(path: Path) -> None:
    path.with_name("r.2.jsonl").mkdir()
    path.with_name("r.1.jsonl").write_text("1\n")
    path.write_text("2\n")
    assert read(path) == [1, 2]


def test_a_run_without_any_file_is_not_found(path: Path) -> None:
    for missing in (path, path / "in a folder that is not there.jsonl"):
        with pytest.raises(FileNotFoundError):
            read(missing)


@pytest.mark.parametrize("name", ["r.jsonl", "r.1.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_is_an_error_without_waiting(path: Path, name: str, kind: str) -> None:
    path.write_text("2\n")
    path.with_name(name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path.with_name(name))
    else:
        path.with_name(name).symlink_to("/dev/zero")
    with pytest.raises(OSError, match=f"not a regular file: '.*{name}'"):
        read(path)


def test_few_files_are_open_at_a_time_and_none_afterwards(path: Path) -> None:
    for number in range(1, 200):
        path.with_name(f"r.{number}.jsonl").write_text(f"{number}\n")
    path.write_text("200\n")
    before = len(os.listdir("/proc/self/fd"))
    reading = listing.open_run(path)
    next(reading)
    assert len(os.listdir("/proc/self/fd")) - before < 50
    reading.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert read(path) == list(range(1, 201))
