"""Requests of the embedding endpoints, parsed from JSON and validated, and the embeddings that a model returns.

Every error is a 400 that names the field and, in a list, the index of the input.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_embed.gateway.api.bodies import EmbeddingsBody, EncodeBody, RequestFields, TokenizeBody
from triton_embed.gateway.api.inputs import (
    NO_PROMPT,
    PROMPT_FIELDS,
    InputErrors,
    Prompt,
    check_keys,
    read_inputs,
    read_prompt,
)
from triton_embed.gateway.api.token_encodings import decode
from triton_embed.gateway.api.validation import parse_object, validate
from triton_embed.gateway.api.vector_formats import Floats, VectorFormat
from triton_embed.gateway.errors import invalid
from triton_embed.gateway.settings import Settings

WRAPPER_KEYS = ("input", *PROMPT_FIELDS)
DEFAULT_FORMAT = VectorFormat()


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A validated request. Either `texts` or `ids` holds the n inputs; the other is empty.

    `images` is empty, or holds the image references of each input. The text of an input with images may be empty. An
    input in `errors` has neither.
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
    errors: Sequence[str] = ()  # message per input, "" if it has no error; () unless on_error is "report"
    reused: npt.NDArray[np.int32] | None = None  # [n], codes of Reused; None unless receipts are requested

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
    raw = {"input": None, **parse_object(body)}
    wrapped = raw["input"]
    if type(wrapped) is dict and "input" in wrapped:  # {"input": …, "instruction": …} as the input itself
        check_keys("input", wrapped, WRAPPER_KEYS, "input")
        if any(wrapped.get(key) for key in PROMPT_FIELDS):
            raw |= dict.fromkeys(PROMPT_FIELDS) | wrapped  # replaces the whole prompt of the request
        raw["input"] = wrapped["input"]
    fields = validate(EmbeddingsBody, raw)
    vector_format = VectorFormat(
        base64=fields.encoding_format in ("base64", ["base64"]),
        output_dtype=fields.output_dtype or "float",
        receipt=bool(fields.return_receipt),
    )
    return read_request(fields, fields.input, "input", settings, vector_format)


def parse_encode(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Parse the body of POST /encode, SGLang's native form.

    Raises:
        ApiError: 400 for an invalid request.
    """
    fields = validate(EncodeBody, parse_object(body))
    text, ids, images = fields.text, fields.input_ids, fields.image_data
    if images is not None:
        if ids is not None:
            raise invalid("image_data goes with text, not with input_ids", "image_data")
        return read_request(fields, _encode_items(text, images), "image_data", settings)
    if (text is None) == (ids is None):
        raise invalid("Send either text or input_ids", "text")
    inputs, param = (ids, "input_ids") if text is None else (text, "text")
    return read_request(fields, inputs, param, settings)


def parse_tokenize(body: bytes, settings: Settings) -> EmbeddingRequest:
    """Parse the body of POST /tokenize: texts under any of the field names in use.

    Raises:
        ApiError: 400 for an invalid request.
    """
    fields = validate(TokenizeBody, parse_object(body))
    names = ("prompt", "input", "text")
    present = {name: value for name in names if (value := getattr(fields, name)) is not None}
    if len(present) != 1:
        raise invalid("Send prompt: a string or a list of strings", "prompt")
    if fields.add_special_tokens is False:
        message = "add_special_tokens cannot be false: the response holds the ids that the model sees"
        raise invalid(message, "add_special_tokens")
    ((param, texts),) = present.items()
    request = read_request(fields, texts, param, settings)
    if request.ids or request.images or request.errors.report:
        raise invalid(f"{param} must be a string or a list of strings", param)
    return request


def read_request(
    fields: RequestFields, inputs: Any, param: str, settings: Settings, vector_format: VectorFormat = DEFAULT_FORMAT
) -> EmbeddingRequest:
    """Build a request from validated fields.

    Args:
        inputs: The value of the field `param`.
        vector_format: Completed with the dimensions in `fields`.

    Raises:
        ApiError: 400 if an input or the prompt is invalid, or the request is too large.
    """
    errors = InputErrors(report=fields.on_error == "report")
    texts, ids, items, single = read_inputs(inputs, param, settings.max_inputs, errors)
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
    if encoding := fields.token_encoding:
        texts, ids = texts or _decode_all(ids, encoding, settings.tiktoken_cache_dir, param, errors), []
    if isinstance(fields.dimensions, list):
        vector_format = replace(vector_format, sizes=tuple(fields.dimensions), several=True)
    elif fields.dimensions is not None:
        vector_format = replace(vector_format, sizes=(fields.dimensions,))
    return EmbeddingRequest(
        model=fields.model or None,
        texts=texts,
        ids=ids,
        single=single,
        param=param,
        vector_format=vector_format,
        prompt=prompt,
        prompts=prompts,
        truncate=fields.truncate,
        long_text=fields.long_text,
        images=images,
        errors=errors,
        batch=fields.priority == "batch",
    )


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


def _decode_all(ids: list[list[int]], encoding: str, tables: str, param: str, errors: InputErrors) -> list[str]:
    """Return the texts that ids of another tokenizer stand for, "" for an input with an error."""
    return [
        "" if i in errors.by_index else errors.attempt(i, partial(decode, row, encoding, tables, i, param), "")
        for i, row in enumerate(ids)
    ]
