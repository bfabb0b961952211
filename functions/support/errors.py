"""Define the errors that users can fix. Scripts print them in one line and exit with status 2."""

# This is EX_TEMPFAIL of sysexits.h, which means "try again later". train.py exits with it when a
# run was stopped by a signal and saved, and can be resumed.
EXIT_STOPPED = 75


class UserError(Exception):
    """An error that users can fix. Scripts print its one sentence without a traceback."""


class CheckpointError(UserError):
    """The file that the message names cannot be used. Callers may use the checkpoint before it."""
