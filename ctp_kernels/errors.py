"""The one error that users of the package see for bad input."""


class CTPError(ValueError):
    """A request that cannot be met: one sentence that says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
