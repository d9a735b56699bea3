"""The exception for errors that users can fix, the exit statuses of the commands, and names for their messages."""

USER_ERROR_STATUS = 2
MACHINE_ERROR_STATUS = 1
INTERRUPTED_STATUS = 130


class UserError(Exception):
    """An error the user can fix. The message is one sentence, or one line per problem.

    The command line prints it without a traceback and exits with status 2.
    """


class StoreError(UserError):
    """A store on the network could not be read; what it holds may still be there, so no data is gone."""
