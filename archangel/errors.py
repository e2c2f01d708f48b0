"""The two exceptions that end a program with one line instead of a traceback."""


class UserError(ValueError):
    """The user can fix this; the message says what is wrong and where (exit status 2)."""


class Interrupted(Exception):
    """A signal ended the program, and its work is saved (exit status 75)."""
