"""Errors that users can mend: the message is a plain sentence that says what is wrong and what to do.

Scripts print it without a traceback and end with exit status 2. There is a subclass only where something catches it
apart from the others.
"""


class UserError(Exception):
    """What a user can mend."""


class CheckpointError(UserError):
    """A checkpoint or run that cannot be used; the message names the file. Readers may take the one before it."""
