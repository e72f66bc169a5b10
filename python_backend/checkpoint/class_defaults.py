"""Keys that config.json leaves to the default of its configuration class, which only transformers knows."""

from collections.abc import Callable
from copy import copy, deepcopy
from typing import TypeVar

from triton_embed.python_backend.checkpoint.json_file import JsonFile, MissingKeyError
from triton_embed.python_backend.errors import ConfigError

Network = TypeVar("Network")


def read_with_defaults(read: Callable[[JsonFile], Network], config: JsonFile) -> Network:
    """Return `read(config)`; if a key is missing, read config.json again as transformers completes it.

    Raises:
        ConfigError: The class has no default for the key either, a value is not valid, or transformers is missing.
    """
    try:
        return read(config)
    except MissingKeyError as missing:
        return read(_completed(config, missing))


def _completed(config: JsonFile, missing: MissingKeyError) -> JsonFile:
    model_type = config.require("model_type", str)
    try:
        from transformers import CONFIG_MAPPING  # not at the top: the import takes longer than all others but torch's
    except ImportError:
        raise ConfigError(
            f"{missing}; transformers knows its default, but is not installed: pip install 'triton-embed[engine]'"
        ) from None
    try:
        values = CONFIG_MAPPING[model_type].from_dict(deepcopy(config.values)).to_dict()
    except Exception as error:
        reason = " ".join(str(error).partition("Errors:")[0].split())[:300]
        raise ConfigError(f"{config.path}: transformers cannot read it: {reason}") from error
    completed = copy(config)
    completed.values = values
    return completed
