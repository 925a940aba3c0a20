"""Sealed folders: a list of the files in a folder with their hashes, which tells damage."""

import hashlib
import json
import os
from pathlib import Path

SEAL = "seal.json"


def seal(folder: Path) -> None:
    """Lists all files of a folder, at any depth, with their hashes; then all is on the disk.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     written = Path(name, "notes.txt").write_text("whole")
        ...     seal(Path(name))
        ...     before = damage(Path(name))
        ...     written = Path(name, "notes.txt").write_text("other")
        ...     before, damage(Path(name))
        ('', 'notes.txt was changed')
    """
    (folder / SEAL).write_text(listing(folder))
    for path in [*folder.rglob("*"), folder]:
        _to_disk(path)


def listing(folder: Path) -> str:
    """All files of a folder, at any depth, with their hashes, as JSON."""
    facts = {"made_by": "lowrank_jax", "files": _hashes(folder)}
    return json.dumps(facts, indent=1) + "\n"


def damage(folder: Path) -> str:
    """What of a sealed folder is not as it was sealed; "" if all is."""
    try:
        wanted = dict(json.loads((folder / SEAL).read_text())["files"])
        found = _hashes(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{SEAL} cannot be used, {type(error).__name__}"
    if missing := sorted(set(wanted) - set(found)):
        return f"{missing[0]} is missing"
    changed = [name for name in sorted(wanted) if found[name] != wanted[name]]
    return f"{changed[0]} was changed" if changed else ""


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
