"""The error that a user can mend."""


class InputError(ValueError):
    """What was given is not what is expected; the message says how to mend it."""
