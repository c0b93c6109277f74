"""UserError, the only exception that commands print without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake outside our code. The message says what is wrong, where, with which value, and how to mend it."""


def close_match(word: str, options: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the option most similar to `word`, or "" if none is similar."""
    matches = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
