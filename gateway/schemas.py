"""Request and response forms, nothing else: JSON bytes to a checked request, vectors to JSON bytes.

Liberal in what it takes, exact in what it refuses: every fault is a 400 that names the field and, in a list,
the index of the item. Checked by hand rather than by a model class because one request may carry 300,000 ids.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import orjson

from triton_embed.gateway.errors import invalid
from triton_embed.gateway.foreign import ENCODINGS, decode
from triton_embed.gateway.forms import OUTPUT_DTYPES, Floats, Form
from triton_embed.gateway.items import (
    NO_PROMPT,
    PROMPT_KEYS,
    WORDS,
    Faults,
    Item,
    Prompt,
    check_keys,
    is_part,
    read_items,
    read_prompt,
    refused,
)
from triton_embed.gateway.settings import Settings

T = TypeVar("T")

WRAPPER_KEYS = ("input", *PROMPT_KEYS)
MOST_SIZES = 16  # vectors an input
REUSED = (None, "in_flight", "cache")  # what a vector was made for: this input, another one, an earlier one
WHOLE = Form()


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A well-formed request. Either `texts` or `ids` holds the n inputs, the other is empty.

    `images` is empty, or holds those of each input as the caller refers to them; such an input's text may be empty.
    An input that is among the `faults` is empty too.
    """

    model: str | None
    texts: list[str]
    ids: list[list[int]]
    single: bool  # one bare input rather than a list of inputs
    param: str  # the field that held the inputs
    form: Form = WHOLE
    prompt: Prompt = NO_PROMPT  # of every input
    prompts: Sequence[Prompt] = ()  # of each, where one has its own
    truncate: str | None = None  # end, start or none
    long_text: str | None = None  # truncate or mean
    images: list[tuple[str, ...]] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    batch: bool = False  # whether it can wait

    @property
    def count(self) -> int:
        """Inputs."""
        return len(self.texts) or len(self.ids)

    def refuse(self, index: int, message: str) -> None:
        """One input is at fault: nothing of it goes on. ApiError 400, unless faults are to be reported."""
        self.faults.add(index, invalid(message, self.param))
        if self.ids:
            self.ids[index] = []
        else:
            self.texts[index] = ""
        if self.images:
            self.images[index] = ()

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[index] if self.prompts else self.prompt

    def parameters(self, rows: Sequence[int]) -> dict[str, int | str]:
        """What travels to the model beside the inputs of `rows`: only what the caller gave."""
        given: dict[str, int | str] = {}
        if self.form.sizes:
            given["dimensions"] = max(self.form.sizes)
        if self.truncate:
            given["truncate"] = self.truncate
        if self.long_text:
            given["long_text"] = self.long_text
        if self.faults.report:
            given["on_error"] = "report"
        if self.prompts:
            given["prompts"] = json.dumps([self.prompts[i].parameters() for i in rows])
        else:
            given.update(self.prompt.parameters())
        return given


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What a model answered for n inputs."""

    vectors: Floats  # [n, d], unit length, little-endian
    tokens: npt.NDArray[np.int32]  # [n], computed, special tokens included
    dropped: npt.NDArray[np.int32]  # [n], cut by truncation
    errors: Sequence[str] = ()  # of each input, empty where there is none; none at all unless they were asked for
    reused: npt.NDArray[np.int32] | None = None  # [n], an index of REUSED; None unless receipts were asked for

    @property
    def truncated(self) -> int:
        """How many inputs lost tokens."""
        return int(np.count_nonzero(self.dropped))

    @property
    def token_count(self) -> int:
        return int(self.tokens.sum())


def parse_embeddings(body: bytes, settings: Settings) -> EmbeddingRequest:
    """POST /v1/embeddings. ApiError 400 for anything that is not a request."""
    fields = parse_object(body)
    given = fields.get("input")
    if type(given) is dict and "input" in given:  # {"input": …, "instruction": …} as the input itself
        check_keys("input", given, WRAPPER_KEYS, "input")
        if any(given.get(key) for key in PROMPT_KEYS):
            fields = {key: value for key, value in fields.items() if key not in PROMPT_KEYS} | given
        given = given["input"]
    asked = read_request(fields, given, "input", settings)
    return replace(asked, form=_form(fields))


def parse_encode(body: bytes, settings: Settings) -> EmbeddingRequest:
    """POST /encode, SGLang's own form. ApiError 400 for anything that is not a request."""
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
    """POST /tokenize: texts under any of the names in use. ApiError 400 for anything else."""
    fields = parse_object(body)
    present = [name for name in ("prompt", "input", "text") if fields.get(name) is not None]
    if len(present) != 1:
        raise invalid("Send prompt: a string or a list of strings", "prompt")
    if fields.get("add_special_tokens") is False:
        message = "add_special_tokens cannot be false: the answer is what the model sees"
        raise invalid(message, "add_special_tokens")
    asked = read_request(fields, fields[present[0]], present[0], settings)
    if asked.ids or asked.images or asked.faults.report:
        raise invalid(f"{present[0]} must be a string or a list of strings", present[0])
    return asked


def embeddings_json(reply: Embeddings, asked: EmbeddingRequest, model: str) -> bytes:
    """The body OpenAI clients read. What failed stands as an error in its place, where that was asked for."""
    values, scales = asked.form.of(reply.vectors)
    data: list[dict[str, Any]] = [{"object": "embedding", "embedding": row, "index": i} for i, row in enumerate(values)]
    if scales is not None:
        for item, scale in zip(data, scales, strict=True):
            item["scale"] = scale
    if asked.form.receipt:
        for i, item in enumerate(data):
            item["receipt"] = _receipt(reply, asked, i)
    for i, error in asked.faults.found.items():
        data[i] = {"object": "error", "index": i, "error": error.body()}
    usage = {"prompt_tokens": reply.token_count, "total_tokens": reply.token_count}
    body = {"object": "list", "data": data, "model": model, "usage": usage}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_json(reply: Embeddings, asked: EmbeddingRequest) -> bytes:
    """The body SGLang's clients read: one object for a bare input, a list for a list."""
    counts = zip(asked.form.of(reply.vectors)[0], reply.tokens.tolist(), reply.dropped.tolist(), strict=True)
    items: list[dict[str, Any]] = [
        {"embedding": row, "meta_info": {"prompt_tokens": tokens, "dropped_tokens": dropped}}
        for row, tokens, dropped in counts
    ]
    for i, error in asked.faults.found.items():
        items[i] = {"error": error.body()}
    return orjson.dumps(items[0] if asked.single else items, option=orjson.OPT_SERIALIZE_NUMPY)


def parse_object(body: bytes) -> dict[str, Any]:
    """The fields of a request. ApiError 400: it is no JSON object."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The request body is not valid JSON: {error}", None) from None
    if type(fields) is not dict:
        raise invalid(f"The request body must be a JSON object, got {WORDS[type(fields)]}", None)
    return fields


def read_request(fields: dict[str, Any], given: Any, param: str, settings: Settings) -> EmbeddingRequest:
    """What every endpoint shares: the inputs under `param`, and the fields that say how to embed them."""
    report = _choice(fields, "on_error", ("fail", "report")) == "report"
    faults = Faults(report)
    texts, ids, items, single = _read_inputs(given, param, settings.max_inputs, faults)
    images: list[tuple[str, ...]] = []
    prompt, prompts = read_prompt(fields), []
    if items:
        texts = [item.text for item in items]
        if any(item.prompt for item in items):
            prompts = [item.prompt or prompt for item in items]
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
    if encoding := _choice(fields, "token_encoding", ENCODINGS):
        texts, ids = texts or _decoded(ids, encoding, settings.tiktoken_cache_dir, param, faults), []
    sizes, several = _sizes(fields.get("dimensions"))
    return EmbeddingRequest(
        model=_optional(fields, "model", str) or None,
        texts=texts,
        ids=ids,
        single=single,
        param=param,
        form=Form(sizes=sizes, several=several),
        prompt=prompt,
        prompts=prompts,
        truncate=_truncate(fields.get("truncate")),
        long_text=_choice(fields, "long_text", ("truncate", "mean")),
        images=images,
        faults=faults,
        batch=_choice(fields, "priority", ("interactive", "batch")) == "batch",
    )


def _form(fields: dict[str, Any]) -> Form:
    sizes, several = _sizes(fields.get("dimensions"))
    return Form(
        base64=_wants_base64(fields.get("encoding_format")),
        output_dtype=_choice(fields, "output_dtype", OUTPUT_DTYPES) or "float",
        sizes=sizes,
        several=several,
        receipt=_optional(fields, "return_receipt", bool) or False,
    )


def _receipt(reply: Embeddings, asked: EmbeddingRequest, index: int) -> dict[str, Any]:
    return {
        "tokens": int(reply.tokens[index]),
        "dropped_tokens": int(reply.dropped[index]),
        "prompt": asked.prompt_of(index).parameters() or None,
        "reused": None if reply.reused is None else REUSED[reply.reused[index]],
    }


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


def _read_inputs(
    given: Any, param: str, most: int, faults: Faults
) -> tuple[list[str], list[list[int]], Sequence[Item], bool]:
    """(texts, ids, items, whether it was one bare input); two of the three are empty."""
    if given is None:
        raise invalid(f"{param} is required", param)
    if given == "" or given == []:
        raise invalid("Input cannot be empty", param)
    if type(given) is str:
        return _texts([given], param, faults), [], (), True
    if type(given) is dict:
        return [], [], read_items([[given] if is_part(given) else given], param, faults), True
    if type(given) is not list:
        raise refused(0, given, "a string, an object or a list", param)
    first = given[0]
    if len(given) > most and type(first) is not int and not is_part(first):  # before a fault is kept for each
        raise invalid(f"At most {most} inputs fit in one request, got {len(given)}", param)
    if type(first) is int:
        return [], _ids([given], param, faults), (), True
    if set(map(type, given)) == {str}:
        return _texts(given, param, faults), [], (), False
    if is_part(first):
        return [], [], read_items([given], param, faults), True
    if type(first) is list and not (first and type(first[0]) is dict):
        return [], _ids(given, param, faults), (), False
    return [], [], read_items(given, param, faults), False


def _texts(given: list[str], param: str, faults: Faults) -> list[str]:
    for i, text in enumerate(given):
        if not text or text.isspace():
            faults.add(i, invalid(f"Input at index {i} cannot be empty or whitespace only", param))
    return given


def _ids(rows: list[Any], param: str, faults: Faults) -> list[list[int]]:
    return [faults.attempt(i, partial(_row_of_ids, i, row, param), []) for i, row in enumerate(rows)]


def _row_of_ids(index: int, row: Any, param: str) -> list[int]:
    if type(row) is not list:
        raise refused(index, row, "a list of token ids, as the first input is", param)
    if not row:
        raise invalid(f"Input at index {index} cannot be empty", param)
    if set(map(type, row)) != {int}:
        stranger = next(item for item in row if type(item) is not int)
        raise refused(index, stranger, "made of token ids", param)
    return row


def _decoded(ids: list[list[int]], encoding: str, tables: str, param: str, faults: Faults) -> list[str]:
    """The texts that another tokenizer's ids stand for."""
    return [
        "" if i in faults.found else faults.attempt(i, partial(decode, row, encoding, tables, i, param), "")
        for i, row in enumerate(ids)
    ]


def _optional(fields: dict[str, Any], name: str, kind: type[T]) -> T | None:
    value = fields.get(name)
    if value is not None and type(value) is not kind:  # so that true is no integer
        raise invalid(f"{name} must be {WORDS[kind]}, got {WORDS[type(value)]}", name)
    return value


def _choice(fields: dict[str, Any], name: str, known: Sequence[str]) -> str | None:
    value = fields.get(name)
    if value is not None and value not in known:
        raise invalid(f"{name} must be one of {', '.join(known)}, got '{str(value)[:100]}'", name)
    return value


def _sizes(given: Any) -> tuple[tuple[int, ...], bool]:
    """(the sizes asked for, whether as a list)."""
    if given is None:
        return (), False
    sizes = given if type(given) is list else [given]
    if not sizes or len(sizes) > MOST_SIZES or any(type(size) is not int for size in sizes):
        got = "another" if type(given) is list else WORDS[type(given)]
        raise invalid(f"dimensions must be an integer, or a list of 1 to {MOST_SIZES} of them, got {got}", "dimensions")
    return tuple(sizes), type(given) is list


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
