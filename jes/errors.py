"""The error that entry points show to people as one line, without a traceback."""


class InputError(ValueError):
    """Something the user gave cannot work: a setting, a file, a folder, a model.

    The message says what is wrong and what to do about it.
    """


class Unavailable(InputError):
    """Something outside cannot be had now: the same command may work later."""
