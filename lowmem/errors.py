"""Defines the one exception for input that cannot be planned."""


class BadInput(ValueError):
    """Raised for input that cannot be planned.

    The message is one line: the variable, its value, its limit and what to do. The CLI prints it on stderr
    and exits 1.
    """
