"""Write files and folders, each of which appears under its name when it is complete, or not at all.

Temporary names are random and created exclusively, so that a link which somebody planted in a shared folder is never
written through.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

AnyPath = str | os.PathLike


def is_gzip(path: AnyPath) -> bool:
    return os.fspath(path).endswith(".gz")


def check_target(path: AnyPath) -> Path:
    """Return where a file of this name will be written: a link is followed, unless another user made it.

    Raises: OSError or ValueError if ``path`` cannot become a regular file.
    """
    if os.fspath(path) == "-":
        raise ValueError("expected the name of a file to write, got -; results are not written to the standard output")
    if os.path.islink(path) and os.lstat(path).st_uid not in (0, os.geteuid()):
        raise ValueError(f"{path} is a link that another user made; name the file that is to be written")
    return _check_place(path, Path(os.path.realpath(path)))


def expect_no_input(output: AnyPath | None, *inputs: AnyPath | None, option: str = "--output") -> None:
    """Check that an output does not replace a file that the same command reads.

    Args:
        output: the file that is to be written; None where none is.
        inputs: files, which need not be there; folders, other names and None never clash.
        option: the option that names the output.
    Raises: ValueError that names the file.
    """
    for path in inputs:
        if output is None or path is None or not (os.path.isfile(output) and os.path.isfile(path)):
            continue
        if os.path.samefile(output, path):
            raise ValueError(f"{option} {output} would replace {path}, which is read; name another file")


def _check_place(path: AnyPath, target: Path) -> Path:
    if target.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of a file to write")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is not a regular file, so it cannot be replaced as a whole; name a file")
    if not target.parent.is_dir():
        what = "is no folder" if target.parent.exists() else "does not exist; create it first"
        raise FileNotFoundError(f"cannot write {path}: the folder {target.parent} {what}")
    return target


class AtomicWriter:
    """A binary file that appears under its name only when it is complete.

    Everything goes to a temporary name beside it; `close` syncs and renames, an exception removes it. The target is
    checked and the temporary file opened at once, so an unwritable output is known before hours of work.

    Args:
        path: the final name; an existing regular file is replaced and gives its permissions.
        mode: permissions of a new file, before the umask.
        follow: whether a link at ``path`` is followed, for names that the user gives. A name that the package chooses
            (``manifest.json``) may be a link that somebody planted, which is replaced.
    Raises: OSError or ValueError if ``path`` cannot become a regular file; OSError that names it if the disk is full.
    """

    def __init__(self, path: AnyPath, mode: int = 0o666, follow: bool = True) -> None:
        self.path = check_target(path) if follow else _check_place(path, Path(os.path.abspath(path)))
        self.temporary = self.path.with_name(temporary_name(self.path.name))
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.file: IO[bytes] = os.fdopen(os.open(self.temporary, flags, _permissions(self.path, mode)), "wb")
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}; choose another place") from None
        # no file name and no time in the header: the same content gives the same bytes
        self.stream = gzip.GzipFile("", "wb", fileobj=self.file, mtime=0) if is_gzip(self.path) else self.file

    def write(self, data: bytes | memoryview) -> None:
        with naming(self.path):
            self.stream.write(data)

    def close(self) -> None:
        """Complete the file and give it its name."""
        try:
            with naming(self.path):
                if self.stream is not self.file:
                    self.stream.close()
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.replace(self.temporary, self.path)
        except BaseException:
            self.discard()
            raise
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Give up, and remove the temporary file."""
        with contextlib.suppress(OSError, ValueError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink()

    def __enter__(self) -> AtomicWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def write_text(path: AnyPath, text: str, mode: int = 0o666, follow: bool = True) -> None:
    """Write ``text`` as UTF-8, completely or not at all; ``mode`` and ``follow`` as in `AtomicWriter`."""
    with AtomicWriter(path, mode, follow) as file:
        file.write(text.encode("utf-8"))


def save_file_with(path: Path, save: Callable[[str], object], mode: int = 0o666) -> None:
    """Let a library write a file, completely or not at all. A link at ``path`` is replaced, not followed.

    Args:
        save: writes the file of the name that it is given.
    Raises: OSError that names ``path`` if it cannot be written.
    """
    with naming(path), private_folder(path) as private:
        new = private / path.name
        save(str(new))
        _sync(new)
        _give_permissions(new, path, mode)
        os.replace(new, path)
    sync_folder(path.parent)


def save_folder_with(folder: Path, save: Callable[[str], object]) -> None:
    """Let a library fill a folder (``save_pretrained``), completely or not at all.

    New files replace those of the same name, and files of weights from an earlier save are removed. A link at
    ``folder`` is replaced, not followed.

    Args:
        save: writes files into the folder of the name that it is given, and makes that folder.
    Raises: OSError that names ``folder`` if it cannot be written.
    """
    with naming(folder), private_folder(folder) as private:
        new = private / folder.name
        save(str(new))
        files = sorted((path for path in new.rglob("*") if path.is_file()), key=lambda path: path.suffix == ".json")
        for path in files:
            _sync(path)
            _give_permissions(path, folder / path.relative_to(new), 0o666)
        if folder.is_symlink():
            folder.unlink()
        if not folder.is_dir():
            os.rename(new, folder)
        else:
            names = [path.relative_to(new) for path in files]
            for name in names:  # configurations last: they refer to the other files
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(new / name, folder / name)
            for path in folder.iterdir():
                weights = path.name.endswith((".safetensors", ".bin", ".index.json"))
                if weights and path.relative_to(folder) not in names:
                    path.unlink()
    sync_folder(folder.parent)


@contextlib.contextmanager
def new_folder(output: AnyPath) -> Iterator[Path]:
    """Make a folder that gets its name when it is complete. Raises: ValueError if there is one of that name."""
    folder = Path(output)
    if folder.exists():
        raise ValueError(f"{output} is there already; name a new folder")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {output}: the folder {folder.absolute().parent} does not exist; create it first"
        )
    temporary = folder.with_name(temporary_name(folder.name))
    try:
        temporary.mkdir()
        yield temporary
        os.rename(temporary, folder)
        sync_folder(folder.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def private_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside ``path`` that only this user can enter, and remove it at the end."""
    folder = tempfile.mkdtemp(prefix=temporary_name(path.name)[:-4] + ".", suffix=".tmp", dir=path.parent)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_name(name: str) -> str:
    """Return a hidden, unpredictable name that is not too long for any file system."""
    return f".{name[:50]}.{os.urandom(6).hex()}.tmp"


def _is_temporary(path: Path) -> bool:
    """Tell whether this is a name that `temporary_name` or `private_folder` makes."""
    return re.fullmatch(r"\..+\.[0-9a-f]{12}(\.[^.]+)?\.tmp", path.name) is not None


def drop_temporary(folder: Path) -> None:
    """Remove what a killed process left in ``folder``, to which no other process writes now; other programs' stays."""
    for path in filter(_is_temporary, folder.glob(".*.tmp")):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def permissions_of(path: AnyPath | None) -> int:
    """Return permissions for files that are derived from the file ``path``: at most its own readers may read them.

    For None, or a path that is no file, these are the permissions of any new file.
    """
    if path is None or not os.path.isfile(path):
        return 0o666
    return stat.S_IMODE(os.stat(path).st_mode) & 0o666 | 0o600


def restrict(path: Path, mode: int) -> None:
    """Remove permissions beyond ``mode``, if this user is allowed to."""
    with contextlib.suppress(OSError):
        if (mine := stat.S_IMODE(path.stat().st_mode)) & ~mode:
            path.chmod(mine & mode)


def folder_permissions(mode: int) -> int:
    """Return permissions of a folder for files of ``mode``, which lets their readers in."""
    return mode | (mode & 0o444) >> 2


@contextlib.contextmanager
def naming(path: AnyPath) -> Iterator[None]:
    """Add the name of ``path`` to errors of the system that do not say where they happened."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    except Exception as error:  # safetensors raises its own, with the number of the system's error
        if not (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from None


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, on file systems that can do this."""
    with contextlib.suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _permissions(path: Path, mode: int) -> int:
    """Return permissions for what is written to ``path``: ``mode`` without those that a file there does not have."""
    try:
        status = os.lstat(path)
    except OSError:
        return mode
    return mode & stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else mode


def _give_permissions(new: Path, path: Path, mode: int) -> None:
    """Give a file of a library the permissions that `AtomicWriter` would: those of safetensors are for one user.

    Args:
        path: the name that it will get; a file that is there gives its permissions.
    """
    probe = new.with_name(temporary_name(new.name))  # the umask is not known without changing it
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _permissions(path, mode)))
    given = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    with contextlib.suppress(OSError):  # some file systems have none
        new.chmod(given)


def why_unreadable(error: object) -> str | None:
    """Say why the system does not give a file that is there, and what to do; None for an error about its content.

    A file that is not there, or is a folder, counts as one with other content: making it again helps.
    """
    if not isinstance(error, OSError) or error.errno in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return None
    denied = error.errno in (errno.EACCES, errno.EPERM)
    return f"{error.strerror}; {'let this user read it' if denied else 'the file itself may be right'}"


def name_what_cannot_be_read(error: Exception) -> str:
    """Return the text of an error; of safetensors, which calls every file that it cannot open missing, the reason."""
    text = " ".join(str(error).split())
    found = re.search(r"No such file or directory: (.+)", text)
    if found and os.path.exists(found[1]) and not os.access(found[1], os.R_OK):
        return f"cannot read {found[1]}: permission denied; let this user read it"
    return text


def cache_folder() -> Path:
    """Return ``$QPEFT_CACHE``, or ``~/.cache/qpeft_ext`` where it is not set; the folder is made if needed."""
    folder = Path(os.environ.get("QPEFT_CACHE") or Path.home() / ".cache" / "qpeft_ext").absolute()
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)  # copies of corpora are kept in it
    except OSError as error:
        raise OSError(
            f"cannot create the cache folder {folder} ({error.strerror}); "
            f"set QPEFT_CACHE to a folder that can be written"
        ) from None
    return folder
