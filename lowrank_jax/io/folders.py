"""Folders of results: each knows its own files, and no other file is ever removed."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from lowrank_jax.io.atomic import flock
from lowrank_jax.io.seals import file_hash, listing

MANIFEST = "manifest.json"  # names of the files that a run wrote, with their hashes
NEW, OLD = ".new", ".old"  # ends of the names of scratch folders


@contextlib.contextmanager
def whole_folder(out: str | os.PathLike) -> Iterator[Path]:
    """Gives a scratch folder, whose files are those of ``out`` at the end.

    If anything fails, the folder stays as it was. If the process is killed, the old files or the
    new ones are there, all of them, and the next run removes what was left beside the folder. Files
    of an earlier run are replaced. Other files, and files that were changed since, are kept. Where
    a new file needs the name, the kept file gets the suffix ".kept1".

    Args:
        out: the folder. It is new, empty or of an earlier run.

    Raises:
        OSError: as `check_folder` says.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as home:
        ...     with whole_folder(f"{home}/runs/one") as scratch:
        ...         written = (scratch / "notes.txt").write_text("whole")
        ...     print(sorted(os.listdir(f"{home}/runs/one")))
        ['manifest.json', 'notes.txt']
    """
    check_folder(out)
    out = Path(out).resolve()
    scratch = _beside(out, NEW)
    with contextlib.ExitStack() as stack:
        with flock(out.parent):
            scratch.mkdir()
            stack.enter_context(flock(scratch))  # others see that the run is alive
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        yield scratch
        _write_manifest(scratch)
        with flock(out.parent):
            _take_place(scratch, out)


def check_folder(out: str | os.PathLike) -> None:
    """Makes the place for a folder of results, or raises before any work is done.

    What killed runs left beside the folder is put in order.

    Raises:
        FileExistsError: the folder is the current one, above it or a disk, lies below a file, or
            holds something else than the results of an earlier run.
        OSError: no folder can be made there.
    """
    check_path(Path(out).parent)
    out = Path(out).resolve()
    if out == Path.cwd() or out in Path.cwd().parents or os.path.ismount(out):
        raise FileExistsError(
            f"{out} is the current folder, a folder above it, or a disk; give a folder within it."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with flock(out.parent):
        probe = _beside(out, NEW)
        probe.mkdir()
        probe.rmdir()
        _put_in_order(out)
        if out.exists() and not _is_ours(out):
            raise FileExistsError(
                f"{out} exists and is no folder of results that an earlier run wrote; give another "
                "one."
            )


def check_path(folder: str | os.PathLike) -> None:
    """Refuses the path of a folder that is a file, or lies below one.

    Raises:
        FileExistsError: the path is a file, or lies below one.
    """
    files = [path for path in (Path(folder), *Path(folder).parents) if path.is_file()]
    if files:
        raise FileExistsError(
            f"{folder} cannot be a folder, as {files[0]} is a file; give another path."
        )


def _is_ours(out: Path) -> bool:
    return out.is_dir() and (not any(out.iterdir()) or _own_files(out) is not None)


def _write_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text(listing(folder))


def _own_files(folder: Path) -> dict[str, str] | None:
    """The files of a manifest with their hashes; None where the folder has no manifest."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        return dict(found["files"]) if found["made_by"] == "lowrank_jax" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _take_place(scratch: Path, out: Path) -> None:
    """Swaps the folders by their names; the old one is taken apart last."""
    old = _beside(out, OLD)
    if out.exists():
        out.rename(old)
    try:
        scratch.rename(out)
    finally:
        _put_in_order(out)


def _put_in_order(out: Path) -> None:
    """Ends what killed runs began: an old folder is back, or taken apart; scratch is removed."""
    for old in _leftovers(out, OLD):
        if out.exists():
            _take_apart(old, out)
        else:
            old.rename(out)
    for scratch in _leftovers(out, NEW):
        with contextlib.suppress(BlockingIOError), flock(scratch, wait=False):
            shutil.rmtree(scratch)


def _take_apart(old: Path, out: Path) -> None:
    """Removes the files that a run wrote; moves all others to the new folder."""
    own = _own_files(old) or {}
    for path in sorted(old.iterdir(), reverse=True):  # a.kept1 before a, which gets a free name
        if path.name == MANIFEST:
            continue
        if not _is_unchanged(path, old, own):
            path.rename(_free_name(out / path.name))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (old / MANIFEST).unlink(missing_ok=True)
    old.rmdir()


def _is_unchanged(path: Path, folder: Path, own: Mapping[str, str]) -> bool:
    """Whether a file, or all within a folder, is as a run wrote it."""
    files = [file for file in (path, *path.rglob("*")) if not file.is_dir()]
    names = [file.relative_to(folder).as_posix() for file in files]
    pairs = zip(names, files, strict=True)
    return bool(files) and all(own.get(name) == file_hash(file) for name, file in pairs)


def _free_name(path: Path) -> Path:
    """The path, or where it is taken, the first free one with another end."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.kept{number}")
    return free


def _beside(out: Path, end: str) -> Path:
    return out.with_name(f".{out.name}.{secrets.token_hex(8)}{end}")


def _leftovers(out: Path, end: str) -> list[Path]:
    return sorted(out.parent.glob(f".{_escaped(out.name)}.{'[0-9a-f]' * 16}{end}"))


def _escaped(name: str) -> str:
    """A name in which no letter has a meaning for ``glob``."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
