"""The one exception a user is meant to see, and how those of others are put into it."""

from correctnet.reloading import survives_reload


@survives_reload
class UserError(Exception):
    """Input that cannot be used: a setting, a file, a model. The message is one line that names it and the way out.

    The command line prints the message alone and exits with status 2; from Python it is an ordinary exception.
    """


def one_line(error: Exception, most: int | None = None) -> str:
    """The message of another's exception without its line breaks, cut to `most` characters."""
    return " ".join(str(error).split())[:most]
