"""Errors that users can mend: scripts print the plain sentence, without a traceback, and end with exit status 2."""


class UserError(Exception):
    """What a user can mend. There is a subclass only where something catches it apart from the others."""


class CheckpointError(UserError):
    """A checkpoint or run that cannot be used; the message names the file. Readers may take the one before it."""
