"""Request and response forms, nothing else: JSON bytes to a checked request, vectors to JSON bytes.

Liberal in what it takes, exact in what it refuses: every fault is a 400 that names the field and, in a list,
the index of the item. Checked by hand rather than by a model class because one request may carry 300,000 ids.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import orjson

from triton_embed.gateway.errors import invalid
from triton_embed.gateway.items import (
    ITEM_SCHEMA,
    PARTS_SCHEMA,
    WORDS,
    Item,
    check_keys,
    is_part,
    read_items,
    refused,
    shared_instruction,
)
from triton_embed.gateway.settings import Settings

T = TypeVar("T")

WRAPPER_KEYS = ("input", "instruction", "prompt_name")
# For the OpenAPI page; the rules themselves are the functions below.
EMBEDDINGS_BODY: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["input"],
    "properties": {
        "input": {
            "description": "One input or a list of them: texts, images, or both in one; or token ids",
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
                {"type": "array", "items": {"anyOf": [{"type": "string"}, ITEM_SCHEMA, PARTS_SCHEMA]}},
                ITEM_SCHEMA,
                PARTS_SCHEMA,
            ],
        },
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
    """A well-formed request. Either `texts` or `ids` holds the n inputs, the other is empty.

    `images` is empty, or holds those of each input as the caller refers to them; such an input's text may be empty.
    """

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
    images: Sequence[Sequence[str]] = ()

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
        check_keys("input", given, WRAPPER_KEYS, "input")
        fields = {**fields, **given}
        given = given["input"]
    return _request(fields, given, "input", settings, base64=_wants_base64(fields.get("encoding_format")))


def parse_encode(body: bytes, settings: Settings) -> EmbeddingRequest:
    """POST /encode, SGLang's own form. ApiError 400 for anything that is not a request."""
    fields = _parse_object(body)
    present = [name for name in ("text", "input_ids") if fields.get(name) is not None]
    if fields.get("image_data") is not None:
        if "input_ids" in present:
            raise invalid("image_data goes with text, not with input_ids", "image_data")
        return _request(fields, _encode_items(fields.get("text"), fields["image_data"]), "image_data", settings)
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
        raise invalid(f"The request body must be a JSON object, got {WORDS[type(fields)]}", None)
    return fields


def _encode_items(text: Any, images: Any) -> Any:
    """SGLang's pair as items: a list of texts, or a list of lists of images, is many inputs; all else is one."""
    if type(text) is list:
        if type(images) is not list or len(images) != len(text):
            message = f"image_data must be a list of {len(text)}, as text is: an image, a list of them or null for each"
            raise invalid(message, "image_data")
        return [{"text": one, "image": its} for one, its in zip(text, images, strict=True)]
    if text is None and type(images) is list and any(type(its) is list for its in images):
        return [{"image": its} for its in images]
    return {"text": text, "image": images}


def _request(
    fields: dict[str, Any], given: Any, param: str, settings: Settings, *, base64: bool = False
) -> EmbeddingRequest:
    texts, ids, items, single = _read_inputs(given, param)
    images: Sequence[Sequence[str]] = ()
    instruction = _optional(fields, "instruction", str) or None
    if items:
        texts = [item.text for item in items]
        instruction = shared_instruction(items, instruction, param)
        if pictures := sum(len(item.images) for item in items):
            images = [item.images for item in items]
        if pictures > settings.max_inputs:
            raise invalid(f"At most {settings.max_inputs} images fit in one request, got {pictures}", param)
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
        instruction=instruction,
        prompt_name=_optional(fields, "prompt_name", str) or None,
        truncate=_truncate(fields.get("truncate")),
        images=images,
    )


def _read_inputs(given: Any, param: str) -> tuple[list[str], list[list[int]], Sequence[Item], bool]:
    """(texts, ids, items, whether it was one bare input); two of the three are empty."""
    if given is None:
        raise invalid(f"{param} is required", param)
    if given == "" or given == []:
        raise invalid("Input cannot be empty", param)
    if type(given) is str:
        return _texts([given], param), [], (), True
    if type(given) is dict:
        return [], [], read_items([[given] if is_part(given) else given], param), True
    if type(given) is not list:
        raise refused(0, given, "a string, an object or a list", param)
    first = given[0]
    if type(first) is int:
        return [], [_ids(0, given, param)], (), True
    if set(map(type, given)) == {str}:
        return _texts(given, param), [], (), False
    if is_part(first):
        return [], [], read_items([given], param), True
    if type(first) is list and not (first and type(first[0]) is dict):
        return [], [_ids(i, row, param) for i, row in enumerate(given)], (), False
    if type(first) not in (str, dict, list):
        raise refused(0, first, "a string, an object or token ids", param)
    return [], [], read_items(given, param), False


def _texts(items: list[str], param: str) -> list[str]:
    for i, item in enumerate(items):
        if not item or item.isspace():
            raise invalid(f"Input at index {i} cannot be empty or whitespace only", param)
    return items


def _ids(index: int, row: Any, param: str) -> list[int]:
    if type(row) is not list:
        raise refused(index, row, "a list of token ids, as the first input is", param)
    if not row:
        raise invalid(f"Input at index {index} cannot be empty", param)
    if set(map(type, row)) != {int}:
        stranger = next(item for item in row if type(item) is not int)
        raise refused(index, stranger, "made of token ids", param)
    return row


def _optional(fields: dict[str, Any], name: str, kind: type[T]) -> T | None:
    value = fields.get(name)
    if value is not None and type(value) is not kind:  # so that true is no integer
        raise invalid(f"{name} must be {WORDS[kind]}, got {WORDS[type(value)]}", name)
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
