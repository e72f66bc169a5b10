"""What a caller may ask of a model, read and checked: pure functions, each error a BadRequest."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend.config import ModelConfig
from triton_embed.python_backend.errors import BadRequest

PARAMETERS = {"dimensions": int, "instruction": str, "prompt_name": str, "truncate": str}
TRUNCATE = ("end", "start", "none")


def parse_parameters(text: str) -> dict[str, Any]:
    """The request parameters, each known and of its kind. BadRequest names the one that is not."""
    parameters: dict[str, Any] = json.loads(text or "{}")
    for key, value in parameters.items():
        if key not in PARAMETERS:
            raise BadRequest(f"Unknown parameter '{key}'; known are {', '.join(PARAMETERS)}")
        if type(value) is not PARAMETERS[key]:
            kind = "a whole number" if PARAMETERS[key] is int else "a string"
            raise BadRequest(f"Parameter '{key}' must be {kind}, got {value!r}")
    if parameters.get("truncate", "end") not in TRUNCATE:
        raise BadRequest(f"truncate must be end, start or none, got '{parameters['truncate']}'")
    return parameters


def check_dimensions(dimensions: int | None, name: str, model: ModelConfig) -> None:
    """SGLang's rules and texts for an output size the model was not asked to learn."""
    if dimensions is None or dimensions == model.hidden_size:
        return
    if dimensions < 1:
        raise BadRequest("Requested dimensions must be greater than 0")
    if dimensions > model.hidden_size:
        raise BadRequest(f"Provided dimensions are greater than max embedding dimension: {model.hidden_size}")
    if model.matryoshka is None:
        raise BadRequest(
            f"Model '{name}' does not support matryoshka representation, "
            "changing output dimensions will lead to poor results."
        )
    if model.matryoshka is not True and dimensions not in model.matryoshka:
        raise BadRequest(
            f"Model '{name}' only supports {list(model.matryoshka)} matryoshka dimensions, "
            "using other output dimensions will lead to poor results."
        )


def decode_text(row: npt.NDArray[np.object_], index: int) -> str:
    """One row of TEXT. BadRequest: not one value, not UTF-8, or nothing but white space."""
    if len(row) != 1:
        raise BadRequest(f"TEXT must be [rows, 1], row {index} has {len(row)} values")
    try:
        text = row[0].decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest(f"Input at index {index} is not valid UTF-8") from None
    if not text.strip():
        raise BadRequest(f"Input at index {index} cannot be empty or whitespace only")
    return str(text)


def unpad_ids(row: npt.NDArray[np.int32], index: int) -> npt.NDArray[np.int32]:
    """Cut the -1s at the end; any other negative id stays and is refused as outside the vocabulary."""
    end = len(row)
    while end and row[end - 1] == -1:
        end -= 1
    if not end:
        raise BadRequest(f"Input at index {index} cannot be empty")
    return row[:end]
