"""Validation of tensors and parameters of a request: pure functions that raise BadRequest."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend import wire
from triton_embed.python_backend.errors import BadInput, BadRequest


@dataclass(frozen=True)
class Item:
    """One input as received: a text, encoded image files, or both."""

    text: str = ""
    images: tuple[bytes, ...] = ()


def parse_parameters(text: str) -> dict[str, Any]:
    """Parse the request parameters.

    Raises:
        BadRequest: A parameter is unknown, or has a wrong type or value.
    """
    parameters: dict[str, Any] = json.loads(text) if text else {}
    if not parameters:
        return parameters
    for key, value in parameters.items():
        if key not in wire.PARAMETERS:
            raise BadRequest(f"Unknown parameter '{key}'; supported: {', '.join(wire.PARAMETERS)}")
        if type(value) is not wire.PARAMETERS[key]:
            kind = "a whole number" if wire.PARAMETERS[key] is int else "a string"
            raise BadRequest(f"Parameter '{key}' must be {kind}, got {value!r}")
    for key, choices in wire.CHOICES.items():
        if parameters.get(key, choices[0]) not in choices:
            words = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise BadRequest(f"{key} must be {words}, got '{parameters[key]}'")
    if parameters.get("timeout_ms", 1) < 1:
        raise BadRequest(f"timeout_ms must be greater than 0, got {parameters['timeout_ms']}")
    if "prompts" in parameters and not parameters.keys().isdisjoint(wire.PROMPT_KEYS):
        raise BadRequest("Send either prompts or one instruction or prompt_name for all rows")
    return parameters


def parse_prompts(text: str, rows: int) -> list[dict[str, str]]:
    """Parse the prompt of each row: empty, an instruction or a prompt_name.

    Raises:
        BadInput: The prompt of a row is invalid.
        BadRequest: `text` is not a JSON list with an entry per row.
    """
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest("prompts is not valid JSON") from None
    if not isinstance(entries, list) or len(entries) != rows:
        count = f"{len(entries)} entries" if isinstance(entries, list) else "a value that is not a list"
        raise BadRequest(f"prompts must be a list with an entry for each of the {rows} rows, got {count}")
    prompts = [{} if prompt is None else prompt for prompt in entries]
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, dict) or not prompt.keys() <= set(wire.PROMPT_KEYS) or len(prompt) > 1:
            raise BadInput(i, "invalid_prompt", "An entry of prompts must hold an instruction or a prompt_name")
        for key, value in prompt.items():
            if not isinstance(value, str):
                raise BadInput(i, "invalid_prompt", f"Parameter '{key}' must be a string, got {value!r}")
            try:
                value.encode()
            except UnicodeEncodeError:  # a lone surrogate, which JSON can write
                raise BadInput(i, "invalid_prompt", f"Parameter '{key}' is not valid Unicode") from None
    return prompts


def count_rows(text: npt.NDArray[np.object_] | None, image: npt.NDArray[np.object_] | None) -> int:
    """Return the number of rows of TEXT and IMAGE.

    Raises:
        BadRequest: Both are missing, their numbers of rows differ, or TEXT has several columns.
    """
    tensors = [tensor for tensor in (text, image) if tensor is not None]
    if not tensors:
        raise BadRequest("Send either TEXT or INPUT_IDS")
    if len({len(tensor) for tensor in tensors}) > 1:
        raise BadRequest(f"TEXT has {len(tensors[0])} rows, IMAGE has {len(tensors[1])}")
    if text is not None and text.size != len(text):
        raise BadRequest(f"TEXT must be [rows, 1], got {list(text.shape)}")
    return len(tensors[0])


def read_item(text: npt.NDArray[np.object_] | None, image: npt.NDArray[np.object_] | None, row: int) -> Item:
    """Return a row of TEXT and IMAGE. A text of white space alone counts as empty.

    Raises:
        BadInput: The text is not UTF-8.
    """
    cell = b"" if text is None else text[row].reshape(-1)[0]
    try:
        decoded = cell.decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput(row, "invalid_text", "Input is not valid UTF-8") from None
    images = () if image is None else tuple(x for x in image[row].reshape(-1) if x)
    return Item(decoded if decoded.strip() else "", images)


def unpad_ids(row: npt.NDArray[np.int32], index: int) -> npt.NDArray[np.int32]:
    """Remove the -1s at the end. Other negative ids stay; they are refused later, as ids outside the vocabulary.

    Raises:
        BadInput: No id is left.
    """
    end = len(row)
    while end and row[end - 1] == -1:
        end -= 1
    if not end:
        raise BadInput(index, "empty", "Input cannot be empty")
    return row[:end]
