"""The errors that leave the engine; every message is safe to show to its reader."""


class BadRequest(ValueError):  # noqa: N818 - the HTTP status it becomes
    """The caller's fault. The message names the field or the row and reaches the caller as it is."""


class ConfigError(ValueError):
    """The operator's fault: a config or checkpoint that cannot be served. Names file, key and values."""
