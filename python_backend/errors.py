"""Errors of the engine whose messages are shown to the caller or to the operator, and are safe to show."""

from triton_embed.python_backend.wire import InputError, InputErrorCode


class BadRequest(ValueError):  # noqa: N818 - the HTTP status it becomes
    """A request that is not valid. The caller receives the message, which names the parameter or the tensor."""


class BadInput(BadRequest):
    """A request with an input that is not valid. The arguments are those of `InputError`, which `error` holds."""

    def __init__(self, index: int, code: InputErrorCode, message: str) -> None:
        self.error = InputError(index, code, message)
        super().__init__(self.error.text)


class ConfigError(ValueError):
    """A config or a checkpoint that cannot be served. The message tells the operator file, key and values."""
