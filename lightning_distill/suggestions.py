"""Nearest valid name of a misspelt one, for error messages."""

from collections.abc import Iterable
from difflib import get_close_matches

SHORTEST = 3
"""Smallest number of characters of a beginning that is completed."""
LISTED = 48
"""Largest number of valid names that a message lists."""
SIMILAR, VERY_SIMILAR = 0.6, 0.8
"""Smallest similarities of names, in [0, 1]: of a suggestion, and of one that is preferred to all others."""


def nearest(name: str, valid: Iterable[str], similarity: float = SIMILAR) -> str | None:
    """Valid name most similar to a misspelt one, ignoring case, or the first that begins with it; None if there is none.

    Args:
        name: The misspelt name.
        valid: The valid names.
        similarity: Smallest similarity, in [0, 1].
    """
    lowered = {each.lower(): each for each in valid}
    close = get_close_matches(name.lower(), lowered, n=1, cutoff=similarity)
    if not close and len(name) >= SHORTEST:
        close = sorted(each for each in lowered if each.startswith(name.lower()))
    return lowered[close[0]] if close else None


def suggestion(name: str, valid: Iterable[str], preferred: Iterable[str] = ()) -> str:
    """Remedy of a misspelt name: the nearest valid name, or the valid names if none is near and they are few.

    Args:
        name: The misspelt name.
        valid: The valid names.
        preferred: Names among them that are suggested first, if they are very similar.
    """
    names = sorted(set(valid))
    if (near := nearest(name, preferred, VERY_SIMILAR) or nearest(name, names)) is not None:
        return f"did you mean {near}?"
    return f"choose one of {', '.join(names)}" if 0 < len(names) <= LISTED else "correct its name"
