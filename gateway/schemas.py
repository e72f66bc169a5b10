"""Request and response forms, nothing else: JSON bytes to a checked request, vectors to JSON bytes.

Liberal in what it takes, exact in what it refuses: every fault is a 400 that names the field and, in a list,
the index of the item. Checked by hand rather than by a model class because one request may carry 300,000 ids.
"""

from base64 import b64encode
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import orjson

from triton_embed.gateway.errors import ApiError, invalid
from triton_embed.gateway.settings import Settings

T = TypeVar("T")

WORDS: Final[dict[type, str]] = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
# For the OpenAPI page; the rules themselves are the functions below.
EMBEDDINGS_BODY: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["input"],
    "properties": {
        "input": {"description": "A string, a list of strings, token ids, or a list of token id lists"},
        "model": {"type": "string", "description": "Optional when one model is ready"},
        "encoding_format": {"enum": ["float", "base64"], "default": "float"},
        "dimensions": {"type": "integer", "minimum": 1},
        "instruction": {"type": "string"},
        "prompt_name": {"type": "string"},
        "truncate": {"enum": ["end", "start", "none", True, False], "default": "end"},
    },
}


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A well-formed request. Either `texts` or `ids` holds the n inputs, the other is empty."""

    model: str | None
    texts: list[str]
    ids: list[list[int]]
    single: bool  # one bare input rather than a list of inputs
    param: str  # the field that held the inputs
    base64: bool = False
    dimensions: int | None = None
    instruction: str | None = None
    prompt_name: str | None = None
    truncate: str | None = None  # end, start or none

    def parameters(self) -> dict[str, int | str]:
        """What travels to the model beside the inputs: only what the caller gave."""
        given = {
            "dimensions": self.dimensions,
            "instruction": self.instruction,
            "prompt_name": self.prompt_name,
            "truncate": self.truncate,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What a model answered for n inputs."""

    vectors: npt.NDArray[np.float32]  # [n, d], unit length, little-endian
    tokens: npt.NDArray[np.int32]  # [n], computed, special tokens included
    dropped: npt.NDArray[np.int32]  # [n], cut by truncation

    @property
    def truncated(self) -> int:
        """How many inputs lost tokens."""
        return int(np.count_nonzero(self.dropped))

    @property
    def token_count(self) -> int:
        return int(self.tokens.sum())


def parse_embeddings(body: bytes, settings: Settings) -> EmbeddingRequest:
    """POST /v1/embeddings. ApiError 400 for anything that is not a request."""
    fields = _parse_object(body)
    given = fields.get("input")
    if type(given) is dict and "input" in given:  # {"input": …, "instruction": …} as the input itself
        fields = {**fields, **{key: given[key] for key in ("instruction", "prompt_name") if key in given}}
        given = given["input"]
    return _request(fields, given, "input", settings, base64=_wants_base64(fields.get("encoding_format")))


def parse_encode(body: bytes, settings: Settings) -> EmbeddingRequest:
    """POST /encode, SGLang's own form. ApiError 400 for anything that is not a request."""
    fields = _parse_object(body)
    if fields.get("image_data") is not None:
        raise invalid("image_data is not supported: this server takes text and token ids only", "image_data")
    present = [name for name in ("text", "input_ids") if fields.get(name) is not None]
    if len(present) != 1:
        raise invalid("Send either text or input_ids", "text")
    return _request(fields, fields[present[0]], present[0], settings)


def embeddings_json(reply: Embeddings, model: str, *, base64: bool) -> bytes:
    """The body OpenAI clients read; `base64` packs each vector as little-endian float32."""
    vectors = [b64encode(row).decode() for row in reply.vectors] if base64 else reply.vectors
    data = [{"object": "embedding", "embedding": row, "index": i} for i, row in enumerate(vectors)]
    usage = {"prompt_tokens": reply.token_count, "total_tokens": reply.token_count}
    body = {"object": "list", "data": data, "model": model, "usage": usage}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_json(reply: Embeddings, *, single: bool) -> bytes:
    """The body SGLang's clients read: one object for a bare input, a list for a list."""
    counts = zip(reply.vectors, reply.tokens.tolist(), reply.dropped.tolist(), strict=True)
    items = [
        {"embedding": row, "meta_info": {"prompt_tokens": tokens, "dropped_tokens": dropped}}
        for row, tokens, dropped in counts
    ]
    return orjson.dumps(items[0] if single else items, option=orjson.OPT_SERIALIZE_NUMPY)


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The request body is not valid JSON: {error}", None) from None
    if type(fields) is not dict:
        raise invalid(f"The request body must be a JSON object, got {_word(fields)}", None)
    return fields


def _request(
    fields: dict[str, Any], given: Any, param: str, settings: Settings, *, base64: bool = False
) -> EmbeddingRequest:
    texts, ids, single = _read_inputs(given, param)
    count, tokens = len(texts) + len(ids), sum(map(len, ids))
    if count > settings.max_inputs:
        raise invalid(f"At most {settings.max_inputs} inputs fit in one request, got {count}", param)
    if tokens > settings.max_request_tokens:
        most = settings.max_request_tokens
        raise invalid(f"The request has {tokens} tokens, more than the {most} a request may have", param)
    return EmbeddingRequest(
        model=_optional(fields, "model", str) or None,
        texts=texts,
        ids=ids,
        single=single,
        param=param,
        base64=base64,
        dimensions=_optional(fields, "dimensions", int),
        instruction=_optional(fields, "instruction", str) or None,
        prompt_name=_optional(fields, "prompt_name", str) or None,
        truncate=_truncate(fields.get("truncate")),
    )


def _read_inputs(given: Any, param: str) -> tuple[list[str], list[list[int]], bool]:
    """(texts, ids, whether it was one bare input); one of the two lists is empty."""
    if given is None:
        raise invalid(f"{param} is required", param)
    if given == "" or given == []:
        raise invalid("Input cannot be empty", param)
    if type(given) is str:
        return _texts([given], param), [], True
    if type(given) is not list:
        raise _refused(0, given, "a string or a list", param)
    if type(given[0]) is str:
        return _texts(given, param), [], False
    if type(given[0]) is int:
        return [], [_ids(0, given, param)], True
    return [], [_ids(i, row, param) for i, row in enumerate(given)], False


def _texts(items: list[Any], param: str) -> list[str]:
    for i, item in enumerate(items):
        if type(item) is not str:
            raise _refused(i, item, "a string, as the first input is", param)
        if not item or item.isspace():
            raise invalid(f"Input at index {i} cannot be empty or whitespace only", param)
    return items


def _ids(index: int, row: Any, param: str) -> list[int]:
    if type(row) is not list:
        raise _refused(index, row, "a list of token ids" if index else "a string or token ids", param)
    if not row:
        raise invalid(f"Input at index {index} cannot be empty", param)
    if set(map(type, row)) != {int}:
        stranger = next(item for item in row if type(item) is not int)
        raise _refused(index, stranger, "made of token ids", param)
    return row


def _refused(index: int, item: Any, wanted: str, param: str) -> ApiError:
    if type(item) is dict:
        message = f"Input at index {index} is an object: this server takes text and token ids only"
    else:
        message = f"Input at index {index} must be {wanted}, got {_word(item)}"
    return invalid(message, param)


def _optional(fields: dict[str, Any], name: str, kind: type[T]) -> T | None:
    value = fields.get(name)
    if value is not None and type(value) is not kind:  # so that true is no integer
        raise invalid(f"{name} must be {WORDS[kind]}, got {_word(value)}", name)
    return value


def _wants_base64(given: Any) -> bool:
    """null and ["float"] mean float: LiteLLM sends those."""
    choice = given[0] if type(given) is list and len(given) == 1 else given
    if choice not in (None, "float", "base64"):
        message = f"encoding_format must be either 'float' or 'base64', got '{str(given)[:100]}'"
        raise invalid(message, "encoding_format")
    return bool(choice == "base64")


def _truncate(given: Any) -> str | None:
    """end, start or none; true is end and false is none, as in text-embeddings-inference."""
    if given is None:
        return None
    if type(given) is bool:
        return "end" if given else "none"
    choice = given.lower() if type(given) is str else ""
    if choice not in ("end", "start", "none"):
        message = f"truncate must be 'end', 'start', 'none' or a boolean, got '{str(given)[:100]}'"
        raise invalid(message, "truncate")
    return choice


def _word(value: Any) -> str:
    return WORDS[type(value)]
