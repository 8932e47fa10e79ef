"""The one exception a user is meant to see."""


class UserError(Exception):
    """Input that cannot be used: a setting, a file, a model. The message is one line that names it and the way out.

    The command line prints the message alone and exits with status 2; from Python it is an ordinary exception.
    """
