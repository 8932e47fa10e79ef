"""`UserError`: mistakes of the user, reported in one line."""

from operator import index
from typing import Any

from correctnet.reloading import survives_reload


@survives_reload
class UserError(Exception):
    """Input that cannot be used: a setting, a file, a model. The message is one line that names it and says what to do.

    The command line prints the message alone and exits with status 2; from Python it is an ordinary exception.
    """


def whole(value: Any, what: str) -> int:
    """`value` as an int. Raises UserError, its message beginning with `what`, for anything but a whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise UserError(f"{what} must be a whole number, not {value!r}") from None


def one_line(error: Exception, most: int | None = None) -> str:
    """The message of an exception without line breaks, cut to `most` characters."""
    return " ".join(str(error).split())[:most]
