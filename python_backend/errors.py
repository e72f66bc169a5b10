"""Errors of the engine whose messages are shown to the caller or to the operator, and are safe to show."""

from triton_embed.python_backend.wire import InputError, InputErrorCode

MAX_MESSAGE = 1_000  # characters: messages quote what callers sent, and ERROR pads all rows to the longest


class BadRequest(ValueError):  # noqa: N818 - the HTTP status it becomes
    """A request that is not valid. The caller receives the message, which names the parameter or the tensor."""

    def __init__(self, message: str) -> None:
        super().__init__(_shorten(message))


class BadInput(BadRequest):
    """A request with an input that is not valid. The arguments are those of `InputError`, which `error` holds."""

    def __init__(self, index: int, code: InputErrorCode, message: str) -> None:
        self.error = InputError(index, code, _shorten(message))
        super().__init__(self.error.text)


class ConfigError(ValueError):
    """A config or a checkpoint that cannot be served. The message tells the operator file, key and values."""


class DeviceLostError(RuntimeError):
    """The GPU refuses every further call of this process, as it does after an illegal memory access."""


def _shorten(message: str) -> str:
    """Return a message without the middle of what it quotes."""
    if len(message) <= MAX_MESSAGE:
        return message
    return f"{message[: MAX_MESSAGE // 2]}…{message[-MAX_MESSAGE // 2 :]}"
