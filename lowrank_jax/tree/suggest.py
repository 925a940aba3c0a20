"""What an error says after a path that names nothing."""

import difflib
from collections.abc import Sequence


def suggest(path: object, known: Sequence[str], none: str) -> str:
    """The paths nearest to a wrong one, or the first of those there are.

    Args:
        path: what was given.
        known: the paths there are.
        none: what to say where there are none.

    Example:
        >>> suggest("Conv_O", ["Conv_0", "Dense_0"], "there is none.")
        "did you mean 'Conv_0'?"
    """
    near = difflib.get_close_matches(str(path), known, n=3, cutoff=0.4) or known[:8]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else none
