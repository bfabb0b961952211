"""Errors that users can mend: scripts print one plain sentence and end with exit status 2."""

# This is EX_TEMPFAIL of sysexits.h, "try again later": a run was stopped and saved, or a GPU has
# failed. Either way the run can be resumed.
EXIT_STOPPED = 75


class UserError(Exception):
    """Say what a user can mend, in a sentence that scripts print without a traceback.

    There is a subclass only where something catches it apart from the others.
    """


class CheckpointError(UserError):
    """Say that a checkpoint or run cannot be used; the message names the file.

    Readers may take the checkpoint before it.
    """
