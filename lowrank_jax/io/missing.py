"""What an error says of a path where nothing is."""

import difflib
import os
from pathlib import Path


def check_exists(path: str | os.PathLike, remedy: str, what: str = "file") -> None:
    """Refuses a path where nothing is, and names what stands beside it under nearly its name.

    Args:
        path: of a file or a folder.
        remedy: what to give, for the message.
        what: what is missing, for the message.

    Raises:
        FileNotFoundError: there is nothing at the path.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"There is no {what} {path}; {_near(place)}{remedy}.")


def _near(place: Path) -> str:
    beside = [own.name for own in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, beside, n=1)
    return f"did you mean {place.with_name(near[0])}? Or " if near else ""
