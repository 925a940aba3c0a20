"""What JAX raises where a function has no derivative."""

# A primitive without a rule is a NotImplementedError, a while loop or a callback a ValueError.
NO_DERIVATIVE = (NotImplementedError, ValueError)
_WORDS = "differentiation", "jvp"


def what_is_lacking(error: Exception) -> str:
    """The first line of an error that says that a derivative is lacking.

    Raises:
        Exception: the error given, if it says something else.

    Example:
        >>> what_is_lacking(ValueError("Pure callbacks do not support JVP."))
        'Pure callbacks do not support JVP.'
    """
    text = str(error)
    if not any(word in text.lower() for word in _WORDS):
        raise error
    return text.splitlines()[0]
