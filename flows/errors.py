"""What is told to the user as one message, without a traceback."""

import difflib
from collections.abc import Iterable


class Problem(Exception):
    """Something the user can put right. The message says what, and how."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint: the closest valid word, or all of them."""
    words = sorted(valid)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else "valid: " + ", ".join(words)
