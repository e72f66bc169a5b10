"""The errors that leave the engine; every message is safe to show to its reader."""

from triton_embed.python_backend.wire import InputError, InputErrorCode


class BadRequest(ValueError):  # noqa: N818 - the HTTP status it becomes
    """The caller's fault. The message names the field or the row and reaches the caller as it is."""


class BadInput(BadRequest):
    """The caller's fault in one input of the request. The arguments are those of InputError."""

    def __init__(self, index: int, code: InputErrorCode, message: str) -> None:
        self.error = InputError(index, code, message)
        super().__init__(self.error.text)


class ConfigError(ValueError):
    """The operator's fault: a config or checkpoint that cannot be served. Names file, key and values."""
