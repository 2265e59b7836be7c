"""The one exception for input that cannot be planned."""


class BadInput(ValueError):
    """One line that names the variable, its value, its limit and what to do. The CLI prints it on stderr and
    exits 1.
    """
