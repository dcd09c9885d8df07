"""`atomic_write` writes a complete file or leaves the old one."""

import pytest

from fastguard.commands.files import atomic_write


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "picture.png"
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.suffix == ".png" and temporary.parent == tmp_path
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_after_a_failure_only_the_old_file_remains(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
