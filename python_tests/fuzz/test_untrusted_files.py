"""Folders that strangers can write to: no link of theirs is followed, and private data stays private."""

import errno
import os
from pathlib import Path

import pytest
from safetensors.torch import save_file

import qpeft_ext as qpeft
from qpeft_ext.cli import main
from qpeft_ext.formats import Corpus
from qpeft_ext.lm.loading import one_line
from qpeft_ext.utils.files import AtomicWriter, save_file_with, save_folder_with, write_text
from qpeft_ext.utils.locks import open_lock_file

# -- links -----------------------------------------------------------------------------------------------------------


def test_saving_an_adapter_writes_through_no_link(lora, tmp_path):
    model, _ = lora
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    shared.mkdir(), victim.mkdir()
    (victim / "file").write_text("precious")
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        for link in (name, f".{name}.tmp"):
            (shared / link).symlink_to(victim / "file")
    (shared / "lm_adapter").symlink_to(victim)
    model.save_pretrained(shared)
    assert [path.name for path in victim.iterdir()] == ["file"] and (victim / "file").read_text() == "precious"
    assert not any((shared / name).is_symlink() for name in ("README.md", "adapter_config.json", "lm_adapter"))
    assert qpeft.QPeftConfig.from_pretrained(shared).clues == "top_k"
    left = {path.name for path in shared.iterdir() if path.name.startswith(".") and not path.is_symlink()}
    assert not left


def test_lock_files_and_parts_are_no_links(job, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "disk").mkdir()
    for link in (tmp_path / "disk" / ".lock", tmp_path / "out.trec.part"):
        link.symlink_to(victim)
    with pytest.raises(ValueError, match="is a link"):
        qpeft.DocumentCache(0, disk=tmp_path / "disk", disk_bytes=1 << 20)
    for more in ("", " --no-resume"):
        assert (
            main(
                (
                    f"rerank --base-model {job}/lm --upr --data {job}/data --run {job}/data/run.trec --output "
                    f"{tmp_path}/out.trec{more}"
                ).split()
            )
            == 2
        )
    assert victim.read_text() == "precious"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        open_lock_file(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to another user")
def test_a_link_of_another_user_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").symlink_to(tmp_path / "victim")
    os.lchown(tmp_path / "run", 12345, 12345)
    with pytest.raises(ValueError, match="a link that another user made"):
        write_text(tmp_path / "run", "new")
    write_text(tmp_path / "run", "new", follow=False)
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "run").is_symlink()


def test_folders_that_libraries_fill(tmp_path):
    """A second save takes the place of the first; stale shards would be loaded instead of the new weights."""
    folder = tmp_path / "lm"

    def save(names):
        def write(path):
            Path(path).mkdir()
            for name in names:
                (Path(path) / name).write_text(names[name])

        return write

    save_folder_with(folder, save({"a-1.safetensors": "1", "a-2.safetensors": "1", "a.index.json": "1", "c.json": "1"}))
    (folder / "notes.txt").write_text("kept")
    save_folder_with(folder, save({"a.safetensors": "2", "c.json": "2"}))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "a.safetensors": "2",
        "c.json": "2",
        "notes.txt": "kept",
    }

    def fail(path):
        save({"a.safetensors": "3"})(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_folder_with(folder, fail)
    assert (folder / "a.safetensors").read_text() == "2" and os.listdir(tmp_path) == ["lm"]


# -- permissions -----------------------------------------------------------------------------------------------------


def permissions(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("mode, expected", [(0o600, 0o600), (0o640, 0o640), (0o644, 0o644)])
def test_what_is_made_of_a_private_corpus_is_private(mode, expected, job, tmp_path):
    corpus = job / "data" / "corpus.jsonl"
    corpus.chmod(mode)
    before = os.umask(0o022)
    try:
        bm25 = f"retrieve --data {job}/data --output {tmp_path}/out"
        assert main(bm25.split()) == 0
        index = f"index {job}/data --out {tmp_path}/index --base-model {job}/lm"
        assert main(index.split()) == 0
        assert permissions(tmp_path / "cache") == permissions(tmp_path / "index") == {expected}
        assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "index").stat().st_mode & 0o777 == expected | (expected & 0o444) >> 2
        corpus.chmod(0o600)
        Corpus(corpus)
        assert {p.stat().st_mode & 0o777 for p in (tmp_path / "cache").glob("corpus-*")} == {0o600}
    finally:
        os.umask(before)


def test_a_disk_cache_is_for_one_user(job, tmp_path):
    cache = qpeft.DocumentCache(0, disk=tmp_path / "disk", disk_bytes=1 << 24)
    qpeft.Reranker.from_pretrained(job / "adapter", cache=cache).predict(
        [("why tides", "the moon pulls"), ("who", "a boat")]
    )
    assert permissions(tmp_path / "disk") == {0o600} and (tmp_path / "disk").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_others_may_read_adapters_as_any_new_file(umask, job, tmp_path):
    """safetensors writes files for one user only, whatever the umask is: a server of another user cannot read them."""
    before = os.umask(umask)
    try:
        qpeft.QPeftModel.from_pretrained(job / "adapter").save_pretrained(tmp_path / "adapter")
        save_folder_with(tmp_path / "lm", lambda path: save_lm_to(Path(path)))
        assert permissions(tmp_path / "adapter") == permissions(tmp_path / "lm") == {0o666 & ~umask}
        (tmp_path / "lm" / "b.safetensors").chmod(0o600)
        save_folder_with(tmp_path / "lm", lambda path: save_lm_to(Path(path)))
        assert (tmp_path / "lm" / "b.safetensors").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "lm" / "b.json").stat().st_mode & 0o777 == 0o666 & ~umask
        assert not list(tmp_path.rglob("*.tmp"))
    finally:
        os.umask(before)


def save_lm_to(folder: Path) -> None:
    folder.mkdir()
    save_file({}, folder / "b.safetensors")
    (folder / "b.json").write_text("{}")


def test_weights_that_may_not_be_read(job, monkeypatch):
    """safetensors says of a file that may not be read that there is none; the tests' user may read every file."""
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    path = job / "adapter" / "adapter_model.safetensors"
    missing = FileNotFoundError(f"No such file or directory: {path}")

    def fail(*arguments, **options):
        raise missing

    monkeypatch.setattr("qpeft_ext.adapters.files.load_file", fail)
    with pytest.raises(OSError, match=f"cannot read {path}: permission denied; let this user read it"):
        qpeft.QPeftModel.from_pretrained(job / "adapter")
    with pytest.raises(OSError, match=f"an LM: cannot read {path}: permission denied"), one_line("an LM"):
        raise missing


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        for name in ("a", "b"):
            write_text(tmp_path / name, "x")
        assert permissions(tmp_path) == {0o644}
        for name in ("a", "b"):
            (tmp_path / name).chmod(0o600)
        write_text(tmp_path / "a", "y")
        save_file_with(tmp_path / "b", lambda path: save_file({}, path))
        assert permissions(tmp_path) == {0o600}
    finally:
        os.umask(before)


def test_an_error_of_the_disk_names_the_file(tmp_path):
    def full(path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device") as caught:
        save_file_with(tmp_path / "weights", full)
    assert caught.value.filename == str(tmp_path / "weights") and caught.value.errno == errno.ENOSPC
    writer = AtomicWriter(tmp_path / "run")
    writer.file.close()
    writer.file = writer.stream = open("/dev/full", "wb")
    writer.write(b"x")
    with pytest.raises(OSError, match="No space left on device") as caught:
        writer.close()
    assert caught.value.filename == str(tmp_path / "run") and not list(tmp_path.iterdir())
