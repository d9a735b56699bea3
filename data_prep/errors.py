"""The one exception a user ever sees, and the exit statuses of the commands."""

USER_ERROR_STATUS = 2
MACHINE_ERROR_STATUS = 1
INTERRUPTED_STATUS = 130


class UserError(Exception):
    """An error the user can fix: its text is one sentence, or one line for each thing that is wrong.

    The command line prints it without a traceback and exits with status 2.
    """
