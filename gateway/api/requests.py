"""Requests and responses of the embedding endpoints: JSON bytes to a validated request, vectors to JSON bytes.

Every error is a 400 that names the field and, in a list, the index of the input. Validation is by hand rather than by a
model class because one request may carry 300,000 token ids.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import orjson

from triton_embed.gateway.api.inputs import (
    JSON_TYPES,
    NO_PROMPT,
    PROMPT_KEYS,
    InputErrors,
    Item,
    Prompt,
    check_keys,
    is_part,
    read_items,
    read_prompt,
    wrong_type,
)
from triton_embed.gateway.api.token_encodings import ENCODINGS, decode
from triton_embed.gateway.api.vector_formats import OUTPUT_DTYPES, Floats, VectorFormat
from triton_embed.gateway.errors import invalid
from triton_embed.gateway.settings import Settings

T = TypeVar("T")

WRAPPER_KEYS = ("input", *PROMPT_KEYS)
MAX_SIZES = 16  # vectors per input
REUSED = (None, "in_flight", "cache")  # by REUSED code: computed for this input, shared, cached
DEFAULT_FORMAT = VectorFormat()


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A validated request. Either `texts` or `ids` holds the n inputs; the other is empty.

    `images` is empty, or holds the image references of each input; the text of such an input may be empty. An input in
    `errors` is empty too.
    """

    model: str | None
    texts: list[str]
    ids: list[list[int]]
    single: bool  # one input instead of a list of inputs
    param: str  # the field that held the inputs
    vector_format: VectorFormat = DEFAULT_FORMAT
    prompt: Prompt = NO_PROMPT  # of every input
    prompts: Sequence[Prompt] = ()  # per input, if any input has a separate prompt
    truncate: str | None = None  # end, start or none
    long_text: str | None = None  # truncate or mean
    images: list[tuple[str, ...]] = field(default_factory=list)
    errors: InputErrors = field(default_factory=InputErrors)
    batch: bool = False  # low priority

    @property
    def count(self) -> int:
        """The number of inputs."""
        return len(self.texts) or len(self.ids)

    def refuse(self, index: int, message: str) -> None:
        """Record an error of one input and clear the input.

        Raises:
            ApiError: 400, unless errors are reported.
        """
        self.errors.add(index, invalid(message, self.param))
        if self.ids:
            self.ids[index] = []
        else:
            self.texts[index] = ""
        if self.images:
            self.images[index] = ()

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[index] if self.prompts else self.prompt

    def parameters(self, rows: Sequence[int]) -> dict[str, int | str]:
        """Return the request parameters for the model with the inputs of `rows`, without those that are unset."""
        parameters: dict[str, int | str] = {}
        if self.vector_format.sizes:
            parameters["dimensions"] = max(self.vector_format.sizes)
        if self.truncate:
            parameters["truncate"] = self.truncate
        if self.long_text:
            parameters["long_text"] = self.long_text
        if self.errors.report:
            parameters["on_error"] = "report"
        if self.prompts:
            parameters["prompts"] = json.dumps([self.prompts[i].parameters() for i in rows])
        else:
            parameters.update(self.prompt.parameters())
        return parameters


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A model's reply for n inputs."""

    vectors: Floats  # [n, d], unit length, little-endian
    tokens: npt.NDArray[np.int32]  # [n], computed, special tokens included
    dropped: npt.NDArray[np.int32]  # [n], removed by truncation
    errors: Sequence[str] = ()  # of each input, empty if it has none; empty sequence unless errors are reported
    reused: npt.NDArray[np.int32] | None = None  # [n], an index into REUSED; None unless receipts are requested

    @property
    def truncated(self) -> int:
        """The number of inputs that lost tokens."""
        return int(np.count_nonzero(self.dropped))

    @property
    def token_count(self) -> int:
        return int(self.tokens.sum())


def parse_embeddings(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Parse the body of POST /v1/embeddings.

    Raises:
        ApiError: 400 for an invalid request.
    """
    fields = parse_object(body)
    value = fields.get("input")
    if type(value) is dict and "input" in value:  # {"input": …, "instruction": …} as the input itself
        check_keys("input", value, WRAPPER_KEYS, "input")
        if any(value.get(key) for key in PROMPT_KEYS):
            fields = {key: other for key, other in fields.items() if key not in PROMPT_KEYS} | value
        value = value["input"]
    request = read_request(fields, value, "input", settings)
    return replace(request, vector_format=_vector_format(fields))


def parse_encode(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Parse the body of POST /encode, SGLang's native form.

    Raises:
        ApiError: 400 for an invalid request.
    """
    fields = parse_object(body)
    present = [name for name in ("text", "input_ids") if fields.get(name) is not None]
    if fields.get("image_data") is not None:
        if "input_ids" in present:
            raise invalid("image_data goes with text, not with input_ids", "image_data")
        items = _encode_items(fields.get("text"), fields["image_data"])
        return read_request(fields, items, "image_data", settings)
    if len(present) != 1:
        raise invalid("Send either text or input_ids", "text")
    return read_request(fields, fields[present[0]], present[0], settings)


def parse_tokenize(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Parse the body of POST /tokenize: texts under any of the field names in use.

    Raises:
        ApiError: 400 for an invalid request.
    """
    fields = parse_object(body)
    present = [name for name in ("prompt", "input", "text") if fields.get(name) is not None]
    if len(present) != 1:
        raise invalid("Send prompt: a string or a list of strings", "prompt")
    if fields.get("add_special_tokens") is False:
        message = "add_special_tokens cannot be false: the response holds the ids that the model sees"
        raise invalid(message, "add_special_tokens")
    request = read_request(fields, fields[present[0]], present[0], settings)
    if request.ids or request.images or request.errors.report:
        raise invalid(f"{present[0]} must be a string or a list of strings", present[0])
    return request


def embeddings_json(reply: Embeddings, request: EmbeddingRequest, model: str) -> bytes:
    """Return OpenAI's response body. Reported errors take the place of their vectors."""
    values, scales = request.vector_format.encode(reply.vectors)
    data: list[dict[str, Any]] = [{"object": "embedding", "embedding": row, "index": i} for i, row in enumerate(values)]
    if scales is not None:
        for item, scale in zip(data, scales, strict=True):
            item["scale"] = scale
    if request.vector_format.receipt:
        for i, item in enumerate(data):
            item["receipt"] = _receipt(reply, request, i)
    for i, error in request.errors.by_index.items():
        data[i] = {"object": "error", "index": i, "error": error.body()}
    usage = {"prompt_tokens": reply.token_count, "total_tokens": reply.token_count}
    body = {"object": "list", "data": data, "model": model, "usage": usage}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_json(reply: Embeddings, request: EmbeddingRequest) -> bytes:
    """Return SGLang's response body: one object for a single input, a list for a list."""
    rows, _ = request.vector_format.encode(reply.vectors)
    items: list[dict[str, Any]] = [
        {"embedding": row, "meta_info": {"prompt_tokens": tokens, "dropped_tokens": dropped}}
        for row, tokens, dropped in zip(rows, reply.tokens.tolist(), reply.dropped.tolist(), strict=True)
    ]
    for i, error in request.errors.by_index.items():
        items[i] = {"error": error.body()}
    return orjson.dumps(items[0] if request.single else items, option=orjson.OPT_SERIALIZE_NUMPY)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a body into its fields.

    Raises:
        ApiError: 400 if it is not a JSON object.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The request body is not valid JSON: {error}", None) from None
    if type(fields) is not dict:
        raise invalid(f"The request body must be a JSON object, got {JSON_TYPES[type(fields)]}", None)
    return fields


def read_request(fields: dict[str, Any], inputs: Any, param: str, settings: Settings) -> EmbeddingRequest:
    """Validate the fields that every endpoint shares: the inputs, from field `param`, and how to embed them."""
    report = _choice(fields, "on_error", ("fail", "report")) == "report"
    errors = InputErrors(report)
    texts, ids, items, single = _read_inputs(inputs, param, settings.max_inputs, errors)
    images: list[tuple[str, ...]] = []
    prompt, prompts = read_prompt(fields), []
    if items:
        texts = [item.text for item in items]
        if any(item.prompt for item in items):
            prompts = [item.prompt or prompt for item in items]
        if image_count := sum(len(item.images) for item in items):
            images = [item.images for item in items]
        if image_count > settings.max_inputs:
            raise invalid(f"At most {settings.max_inputs} images fit in one request, got {image_count}", param)
    count, tokens = len(texts) + len(ids), sum(map(len, ids))
    if count > settings.max_inputs:
        raise invalid(f"At most {settings.max_inputs} inputs fit in one request, got {count}", param)
    if tokens > settings.max_request_tokens:
        limit = settings.max_request_tokens
        raise invalid(f"The request has {tokens} tokens, more than the {limit} a request may have", param)
    if encoding := _choice(fields, "token_encoding", ENCODINGS):
        texts, ids = texts or _decode_all(ids, encoding, settings.tiktoken_cache_dir, param, errors), []
    sizes, several = _sizes(fields.get("dimensions"))
    return EmbeddingRequest(
        model=_optional(fields, "model", str) or None,
        texts=texts,
        ids=ids,
        single=single,
        param=param,
        vector_format=VectorFormat(sizes=sizes, several=several),
        prompt=prompt,
        prompts=prompts,
        truncate=_truncate(fields.get("truncate")),
        long_text=_choice(fields, "long_text", ("truncate", "mean")),
        images=images,
        errors=errors,
        batch=_choice(fields, "priority", ("interactive", "batch")) == "batch",
    )


def _vector_format(fields: dict[str, Any]) -> VectorFormat:
    sizes, several = _sizes(fields.get("dimensions"))
    return VectorFormat(
        base64=_wants_base64(fields.get("encoding_format")),
        output_dtype=_choice(fields, "output_dtype", OUTPUT_DTYPES) or "float",
        sizes=sizes,
        several=several,
        receipt=_optional(fields, "return_receipt", bool) or False,
    )


def _receipt(reply: Embeddings, request: EmbeddingRequest, index: int) -> dict[str, Any]:
    return {
        "tokens": int(reply.tokens[index]),
        "dropped_tokens": int(reply.dropped[index]),
        "prompt": request.prompt_of(index).parameters() or None,
        "reused": None if reply.reused is None else REUSED[reply.reused[index]],
    }


def _encode_items(text: Any, images: Any) -> Any:
    """Return SGLang's text and image_data as inputs.

    A list of texts, or a list of lists of images, is many inputs; anything else is one.
    """
    if type(text) is list:
        if type(images) is not list or len(images) != len(text):
            message = f"image_data must be a list of {len(text)}, as text is: an image, a list of them or null for each"
            raise invalid(message, "image_data")
        return [{"text": content, "image": image} for content, image in zip(text, images, strict=True)]
    if text is None and type(images) is list and any(type(image) is list for image in images):
        return [{"image": image} for image in images]
    return {"text": text, "image": images}


def _read_inputs(
    value: Any, param: str, max_inputs: int, errors: InputErrors
) -> tuple[list[str], list[list[int]], Sequence[Item], bool]:
    """Return (texts, ids, items, whether it was a single input). Two of the three lists are empty."""
    if value is None:
        raise invalid(f"{param} is required", param)
    if value == "" or value == []:
        raise invalid("Input cannot be empty", param)
    if type(value) is str:
        return _texts([value], param, errors), [], (), True
    if type(value) is dict:
        return [], [], read_items([[value] if is_part(value) else value], param, errors), True
    if type(value) is not list:
        raise wrong_type(0, value, "a string, an object or a list", param)
    first = value[0]
    # Checked again by the caller; here, before an error is recorded for each input.
    if len(value) > max_inputs and type(first) is not int and not is_part(first):
        raise invalid(f"At most {max_inputs} inputs fit in one request, got {len(value)}", param)
    if type(first) is int:
        return [], _ids([value], param, errors), (), True
    if set(map(type, value)) == {str}:
        return _texts(value, param, errors), [], (), False
    if is_part(first):
        return [], [], read_items([value], param, errors), True
    if type(first) is list and not (first and type(first[0]) is dict):
        return [], _ids(value, param, errors), (), False
    return [], [], read_items(value, param, errors), False


def _texts(texts: list[str], param: str, errors: InputErrors) -> list[str]:
    for i, text in enumerate(texts):
        if not text or text.isspace():
            errors.add(i, invalid(f"Input at index {i} cannot be empty or whitespace only", param))
    return texts


def _ids(rows: list[Any], param: str, errors: InputErrors) -> list[list[int]]:
    return [errors.attempt(i, partial(_row_of_ids, i, row, param), []) for i, row in enumerate(rows)]


def _row_of_ids(index: int, row: Any, param: str) -> list[int]:
    if type(row) is not list:
        raise wrong_type(index, row, "a list of token ids, as the first input is", param)
    if not row:
        raise invalid(f"Input at index {index} cannot be empty", param)
    if set(map(type, row)) != {int}:
        other = next(item for item in row if type(item) is not int)
        raise wrong_type(index, other, "made of token ids", param)
    return row


def _decode_all(ids: list[list[int]], encoding: str, tables: str, param: str, errors: InputErrors) -> list[str]:
    """Return the texts of ids of another tokenizer."""
    return [
        "" if i in errors.by_index else errors.attempt(i, partial(decode, row, encoding, tables, i, param), "")
        for i, row in enumerate(ids)
    ]


def _optional(fields: dict[str, Any], name: str, kind: type[T]) -> T | None:
    value = fields.get(name)
    if value is not None and type(value) is not kind:  # not isinstance: true is not an integer here
        raise invalid(f"{name} must be {JSON_TYPES[kind]}, got {JSON_TYPES[type(value)]}", name)
    return value


def _choice(fields: dict[str, Any], name: str, choices: Sequence[str]) -> str | None:
    value = fields.get(name)
    if value is not None and value not in choices:
        raise invalid(f"{name} must be one of {', '.join(choices)}, got '{str(value)[:100]}'", name)
    return value


def _sizes(value: Any) -> tuple[tuple[int, ...], bool]:
    """Return (the requested dimensions, whether they came as a list)."""
    if value is None:
        return (), False
    sizes = value if type(value) is list else [value]
    if not sizes or len(sizes) > MAX_SIZES or any(type(size) is not int for size in sizes):
        got = "an invalid list" if type(value) is list else JSON_TYPES[type(value)]
        raise invalid(f"dimensions must be an integer or a list of 1 to {MAX_SIZES} integers, got {got}", "dimensions")
    return tuple(sizes), type(value) is list


def _wants_base64(value: Any) -> bool:
    """Return whether base64 is requested. null and ["float"], which LiteLLM sends, mean float."""
    choice = value[0] if type(value) is list and len(value) == 1 else value
    if choice not in (None, "float", "base64"):
        message = f"encoding_format must be either 'float' or 'base64', got '{str(value)[:100]}'"
        raise invalid(message, "encoding_format")
    return bool(choice == "base64")


def _truncate(value: Any) -> str | None:
    """Return end, start or none. As in text-embeddings-inference, true means end and false means none."""
    if value is None:
        return None
    if type(value) is bool:
        return "end" if value else "none"
    choice = value.lower() if type(value) is str else ""
    if choice not in ("end", "start", "none"):
        message = f"truncate must be 'end', 'start', 'none' or a boolean, got '{str(value)[:100]}'"
        raise invalid(message, "truncate")
    return choice
