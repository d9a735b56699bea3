"""The one exception a user ever sees."""


class UserError(Exception):
    """Something the user can mend: its text is one sentence, or one line for each thing that is wrong.

    The command line prints it without a traceback and leaves with exit status 2.
    """
