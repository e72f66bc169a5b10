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


PARAMETERS = {
    "dimensions": int,
    "instruction": str,
    "prompt_name": str,
    "prompts": str,
    "truncate": str,
    "long_text": str,
    "on_error": str,
    "timeout_ms": int,
}
# Of parameters that take one of a few words, the default first.
CHOICES = {"truncate": ("end", "start", "none"), "long_text": ("truncate", "mean"), "on_error": ("fail", "report")}
PROMPT = ("instruction", "prompt_name")  # what a row's own prompt may hold, one of them
PROMPTS = (*PROMPT, "prompts")


def parse_parameters(text: str) -> dict[str, Any]:
    """The request parameters, each known and of its kind. BadRequest names the one that is not."""
    parameters: dict[str, Any] = json.loads(text) if text else {}
    if not parameters:
        return parameters
    for key, value in parameters.items():
        if key not in PARAMETERS:
            raise BadRequest(f"Unknown parameter '{key}'; known are {', '.join(PARAMETERS)}")
        if type(value) is not PARAMETERS[key]:
            kind = "a whole number" if PARAMETERS[key] is int else "a string"
            raise BadRequest(f"Parameter '{key}' must be {kind}, got {value!r}")
    for key, known in CHOICES.items():
        if parameters.get(key, known[0]) not in known:
            words = f"{', '.join(known[:-1])} or {known[-1]}"
            raise BadRequest(f"{key} must be {words}, got '{parameters[key]}'")
    if parameters.get("timeout_ms", 1) < 1:
        raise BadRequest(f"timeout_ms must be greater than 0, got {parameters['timeout_ms']}")
    if "prompts" in parameters and not parameters.keys().isdisjoint(PROMPT):
        raise BadRequest("Send either prompts or one instruction or prompt_name for all rows")
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


def parse_prompts(text: str, rows: int) -> list[dict[str, str]]:
    """The prompt of each row: nothing, an instruction or a prompt_name. BadRequest names the row that is otherwise."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest("prompts is not valid JSON") from None
    if not isinstance(found, list) or len(found) != rows:
        count = f"{len(found)} entries" if isinstance(found, list) else "no list"
        raise BadRequest(f"prompts must be a list with an entry for each of the {rows} rows, got {count}")
    prompts = [{} if prompt is None else prompt for prompt in found]
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, dict) or not prompt.keys() <= set(PROMPT) or len(prompt) > 1:
            raise BadRequest(f"An entry of prompts must hold an instruction or a prompt_name (input at index {i})")
        for key, value in prompt.items():
            if not isinstance(value, str):
                raise BadRequest(f"Parameter '{key}' must be a string, got {value!r} (input at index {i})")
            try:
                value.encode()
            except UnicodeEncodeError:  # a lone surrogate, which JSON can write
                raise BadRequest(f"Parameter '{key}' is not valid Unicode (input at index {i})") from None
    return prompts


def count_rows(text: npt.NDArray[np.object_] | None, image: npt.NDArray[np.object_] | None) -> int:
    """Rows of TEXT and IMAGE. BadRequest: neither tensor, different numbers of rows, or TEXT with several columns."""
    given = [tensor for tensor in (text, image) if tensor is not None]
    if not given:
        raise BadRequest("Send either TEXT or INPUT_IDS")
    if len({len(tensor) for tensor in given}) > 1:
        raise BadRequest(f"TEXT has {len(given[0])} rows, IMAGE has {len(given[1])}")
    if text is not None and text.size != len(text):
        raise BadRequest(f"TEXT must be [rows, 1], got {list(text.shape)}")
    return len(given[0])


def read_item(text: npt.NDArray[np.object_] | None, image: npt.NDArray[np.object_] | None, row: int) -> Item:
    """A row of TEXT and IMAGE; a text of nothing but white space is none. BadRequest: the text is not UTF-8."""
    found = b"" if text is None else text[row].reshape(-1)[0]
    try:
        written = found.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest(f"Input at index {row} is not valid UTF-8") from None
    images = () if image is None else tuple(x for x in image[row].reshape(-1) if x)
    return Item(written if written.strip() else "", images)


def unpad_ids(row: npt.NDArray[np.int32], index: int) -> npt.NDArray[np.int32]:
    """Cut the -1s at the end; any other negative id stays and is refused as outside the vocabulary."""
    end = len(row)
    while end and row[end - 1] == -1:
        end -= 1
    if not end:
        raise BadRequest(f"Input at index {index} cannot be empty")
    return row[:end]
