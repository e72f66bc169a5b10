"""What a caller may ask of a model, read and checked: pure functions, each error a BadRequest."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend.config import ModelConfig
from triton_embed.python_backend.errors import BadRequest


@dataclass(frozen=True)
class Item:
    """One input as it was sent: a text, encoded image files, or both."""

    text: str = ""
    images: tuple[bytes, ...] = ()


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
    if dimensions is None or dimensions == model.dimensions:
        return
    if dimensions < 1:
        raise BadRequest("Requested dimensions must be greater than 0")
    if dimensions > model.dimensions:
        raise BadRequest(f"Provided dimensions are greater than max embedding dimension: {model.dimensions}")
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
    """One row of TEXT; empty where it holds nothing but white space. BadRequest: not one value, or not UTF-8."""
    if len(row) != 1:
        raise BadRequest(f"TEXT must be [rows, 1], row {index} has {len(row)} values")
    try:
        text = row[0].decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest(f"Input at index {index} is not valid UTF-8") from None
    return str(text) if text.strip() else ""


def read_items(text: npt.NDArray[np.object_] | None, image: npt.NDArray[np.object_] | None) -> list[Item]:
    """One item a row of TEXT and IMAGE. BadRequest: neither tensor, different numbers of rows, or text that is none."""
    given = [tensor for tensor in (text, image) if tensor is not None]
    if not given:
        raise BadRequest("Send either TEXT or INPUT_IDS")
    if len({len(tensor) for tensor in given}) > 1:
        raise BadRequest(f"TEXT has {len(given[0])} rows, IMAGE has {len(given[1])}")
    rows = range(len(given[0]))
    texts = [""] * len(rows) if text is None else [decode_text(text[i].reshape(-1), i) for i in rows]
    images = [()] * len(rows) if image is None else [tuple(x for x in image[i].reshape(-1) if x) for i in rows]
    return [Item(*pair) for pair in zip(texts, images, strict=True)]


def unpad_ids(row: npt.NDArray[np.int32], index: int) -> npt.NDArray[np.int32]:
    """Cut the -1s at the end; any other negative id stays and is refused as outside the vocabulary."""
    end = len(row)
    while end and row[end - 1] == -1:
        end -= 1
    if not end:
        raise BadRequest(f"Input at index {index} cannot be empty")
    return row[:end]
