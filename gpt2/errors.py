"""The one exception that is meant for the person at the terminal."""


class UserError(Exception):
    """Something the user can put right. Its text is one clear message: what is wrong, with both numbers where there
    are two, and the way out. Stage commands print it without a traceback and exit with status 2."""
