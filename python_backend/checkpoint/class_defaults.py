"""Keys that a checkpoint's files leave to the defaults of its classes, which only transformers knows."""

import json
from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any, TypeVar

from triton_embed.python_backend.checkpoint.json_file import JsonFile, MissingKeyError
from triton_embed.python_backend.errors import ConfigError

Settings = TypeVar("Settings")


def read_with_defaults(read: Callable[[JsonFile], Settings], file: JsonFile, image_processor: str = "") -> Settings:
    """Return `read(file)`; if a key is missing, read the file again as transformers completes it.

    Args:
        read: Reads the settings that the engine needs, and raises a MissingKeyError for a key without a value.
        file: config.json, or the file of an image processor.
        image_processor: The class of the image processor in transformers.

    Raises:
        ConfigError: The class has no default for the key either, a value is not valid, or transformers is missing.
    """
    try:
        return read(file)
    except MissingKeyError as missing:
        completed = copy(file)
        try:
            # transformers is not imported at the top: its import takes longer than all others but torch's.
            completed.values = _image_processor(file, image_processor) if image_processor else _config(file)
        except ImportError:
            raise ConfigError(
                f"{missing}; transformers knows its default, but is not installed: pip install 'triton-embed[engine]'"
            ) from None
        return read(completed)


def _config(file: JsonFile) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[file.require("model_type", str)]
    try:
        values: dict[str, Any] = config_class.from_dict(deepcopy(file.values)).to_dict()
    except Exception as error:
        reason = " ".join(str(error).partition("Errors:")[0].split())[:300]
        raise ConfigError(f"{file.path}: transformers cannot read it: {reason}") from error
    return values


def _image_processor(file: JsonFile, name: str) -> dict[str, Any]:
    import transformers

    defaults: dict[str, Any] = json.loads(getattr(transformers, f"{name}Pil")().to_json_string())
    return defaults | file.values
