"""The one error that users of the package see for bad input."""


class CTPError(ValueError):
    """A request that cannot be met: one sentence that says what is wrong and what to do."""
