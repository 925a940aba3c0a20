"""Files that appear whole or not at all, and a lock for files that processes share."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a scratch path beside a file. At the end the scratch file takes the file's place.

    Readers find the old file or the new one, never a part. If anything fails, the scratch file is
    removed and the old file stays. The content is on the disk before it gets the file's name. A
    symbolic link stays, and its target is replaced. A file that exists keeps its mode. Threads and
    processes may write to one path at once: the last one that finishes wins.

    Args:
        path: of the file. Its folder must exist.

    Raises:
        FileNotFoundError: the folder does not exist, or the body wrote no file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(f"{folder}/notes.txt") as scratch:
        ...         written = scratch.write_text("whole")
        ...     print(Path(folder, "notes.txt").read_text(), len(os.listdir(folder)))
        whole 1
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {target.parent}. Make it first.")
    scratch = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        yield scratch
        _to_disk(scratch)
        _copy_mode(target, scratch)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Holds a file for one thread of one process, so that reading and writing it is one step.

    The lock is a hidden file beside the path, which stays there. Only code that asks for the same
    lock waits. Where the system has no such locks (Windows), nothing is held.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, locked(f"{folder}/times.json"):
        ...     print(os.listdir(folder))
        ['.times.json.lock']
    """
    target = Path(os.path.realpath(path))
    if fcntl is None:
        yield
        return
    lock = target.with_name(f".{target.name}.lock")
    lock.touch()
    with flock(lock):
        yield


@contextlib.contextmanager
def flock(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds a file or folder that exists; the lock ends with the process at the latest.

    Raises:
        BlockingIOError: ``wait`` is false, and another holder has the lock, or the system has no
            locks.
    """
    if fcntl is None:
        if not wait:
            raise BlockingIOError(f"{path}: this system has no locks.")
        yield
        return
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(file)


def _to_disk(scratch: Path) -> None:
    with scratch.open("r+b") as file:
        os.fsync(file.fileno())


def _copy_mode(target: Path, scratch: Path) -> None:
    if target.exists():
        scratch.chmod(stat.S_IMODE(target.stat().st_mode))
