"""Locks between processes: one owner at a time, and what is renamed meanwhile is opened again."""

import os

import pytest

from qpeft_ext.utils.locks import claim, lock_folder, locked_folder, open_locked


def test_a_locked_folder_has_one_owner_and_goes_when_it_is_empty(tmp_path):
    folder = tmp_path / "output"
    with locked_folder(folder):
        with pytest.raises(ValueError, match="being written by another process; let it end, or name another folder"):
            with locked_folder(folder):
                pass
        assert folder.is_dir()
    assert not folder.exists()
    with locked_folder(folder):
        (folder / "adapter").touch()
    assert folder.is_dir()


def test_a_folder_locked_through_a_file_in_it_has_one_owner(tmp_path):
    with lock_folder(tmp_path), pytest.raises(ValueError, match="in use by another process"):
        lock_folder(tmp_path)
    lock_folder(tmp_path).close()


def test_a_claim_tells_who_has_it(tmp_path):
    with claim(tmp_path / "result", wait=False) as mine, claim(tmp_path / "result", wait=False) as other:
        assert mine and not other
    with claim(tmp_path / "result", wait=True) as mine:
        assert mine


def test_a_file_that_was_renamed_before_it_was_locked_is_opened_again(tmp_path):
    path, opened = tmp_path / "run.part", []

    def open_path() -> int:
        opened.append(os.open(path, os.O_RDWR | os.O_CREAT))
        if len(opened) == 1:
            os.rename(path, tmp_path / "run")
        return opened[-1]

    file = open_locked(path, open_path, "wait")
    assert len(opened) == 2
    assert os.path.samestat(os.fstat(file), os.stat(path))
    os.close(file)
