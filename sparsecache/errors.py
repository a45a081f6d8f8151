"""The one exception that is meant for users."""


class UsageError(Exception):
    """Something the user can put right: a full sentence with the value, what is allowed and the way out.

    The command lines print it and exit with code 2; nothing else in the project is caught there.
    """


def one_line(error: BaseException) -> str:
    """Another library's error as part of a sentence."""
    return " ".join(str(error).split()) or type(error).__name__
