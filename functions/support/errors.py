"""Define the errors that users can mend. Scripts print them in one line and exit with status 2."""

# This is EX_TEMPFAIL of sysexits.h, which means "try again later". A run was stopped and saved, or
# a GPU has failed. Either way the run can be resumed.
EXIT_STOPPED = 75


class UserError(Exception):
    """Report an error that a user can mend. Scripts print its one sentence without a traceback.

    A subclass exists only where some code catches that subclass alone.
    """


class CheckpointError(UserError):
    """Report that a checkpoint or a run cannot be used. The message names the file.

    Readers may catch this error and use the checkpoint before.
    """
