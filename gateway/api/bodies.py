"""Request bodies: each field once, with its type, limits and description. The OpenAPI document is made of these models.

Fields that hold inputs are `Any` with a declared JSON schema, and inputs.py parses them by hand, because
pydantic is slower (measured for 300,000 token ids: 17.5 ms by hand, 24.4 ms in a pydantic union).
"""

from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, WithJsonSchema
from typing_extensions import TypedDict

from triton_embed.gateway.api.token_encodings import Encoding
from triton_embed.gateway.api.validation import Expected, json_type, quoted
from triton_embed.gateway.api.vector_formats import OutputDtype

MAX_SIZES = 16  # vectors per input
PART_TYPES = ("text", "image_url", "image")  # types of content parts in OpenAI's and Qwen's messages
# Accepted values of input_type, including Cohere's and Voyage's -> query or document.
INPUT_TYPES: Final = {
    "query": "query",
    "document": "document",
    "passage": "document",
    "search_query": "query",
    "search_document": "document",
}


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of a type, without titles and references."""
    schema = TypeAdapter(kind).json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if type(node) is list:
            return [resolve(item) for item in node]
        if type(node) is not dict:
            return node
        node = definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        return {key: resolve(value) for key, value in node.items() if key != "title"}

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def accepts(kind: Any) -> WithJsonSchema:
    """Document a field as `kind` rather than as its annotated type."""
    return WithJsonSchema(schema_of(kind))


def undocumented(*names: str) -> ConfigDict:
    """Leave fields out of the JSON schema of a body that checks but does not use them."""

    def remove(schema: dict[str, Any]) -> None:
        for name in names:
            del schema["properties"][name]

    return ConfigDict(json_schema_extra=remove)


def _truncation(value: Any) -> Any:
    """Return end, start or none. As in text-embeddings-inference, true means end and false means none."""
    if type(value) is bool:
        return "end" if value else "none"
    return value.lower() if type(value) is str else value


def _one_input(value: Any) -> Any:
    """Refuse null, a list, and a blank text."""
    if value is None or type(value) is list or (type(value) is str and not value.strip()):
        raise ValueError
    return value


def _type_or_empty(value: Any) -> str:
    return "an empty one" if value in ("", []) else json_type(value)


def _number(value: Any) -> Any:
    """Return a number for its digits."""
    return int(value) if type(value) is str and value.isascii() and value.isdecimal() else value


def _lane(value: Any) -> Any:
    """Return the lane of vLLM's numeric priority, where more than 0 may wait."""
    return ("batch" if value > 0 else "interactive") if type(value) is int else value


Texts = str | list[str]
TokenIds = Annotated[list[int], Field(description="Token ids of the model's tokenizer, used without changes")]
Image = Annotated[Texts, Field(description="A data: URI, base64, or http(s) URL; a list: several images in one input")]
# The minimum is only documented: `fit` refuses other values in SGLang's words.
Size = Annotated[int, Field(json_schema_extra={"minimum": 1})]
Sizes = Annotated[
    Size | Annotated[list[int], Field(min_length=1, max_length=MAX_SIZES, fail_fast=True)] | None,
    BeforeValidator(_number),
    Expected(
        f"an integer or a list of 1 to {MAX_SIZES} integers",
        lambda value: "an invalid list" if type(value) is list else json_type(value),
    ),
]
Truncation = Literal["end", "start", "none"]
FloatEncoding = Literal["float", "base64"]
TextOrTexts = Annotated[
    str | Annotated[list[str], Field(min_length=1, fail_fast=True)], Expected("a text or a list of texts", None)
]


class ImageLink(TypedDict):
    url: str
    detail: NotRequired[str]  # ignored: the model's own rules decide the resolution


class ContentPart(TypedDict):
    type: Annotated[str, accepts(Literal[PART_TYPES])]
    text: NotRequired[str]
    image_url: NotRequired[str | ImageLink]
    image: NotRequired[Image]


class PromptFields(BaseModel):
    model_config = ConfigDict(strict=True, use_attribute_docstrings=True)

    instruction: str | None = None
    """The task description, placed before a query as the model was trained"""
    prompt_name: str | None = None
    """Name of one of the model's prompts"""
    input_type: Annotated[str | None, accepts(Literal[tuple(INPUT_TYPES)] | None)] = None
    """The role of the input in a search: a query gets the model's prompt for queries, if it has one"""


class ItemFields(PromptFields):
    """One input: a text, an image, or both if the model embeds them together"""

    model_config = ConfigDict(extra="forbid")

    text: str | None = None
    image: Annotated[Any, accepts(Image | None)] = None
    image_url: Annotated[Any, accepts(str | ImageLink | None)] = None


class WrappedInput(PromptFields):
    """The input and its prompt as one object"""

    input: Any


Parts = Annotated[list[ContentPart], Field(description="Content parts of one input, as in OpenAI's messages")]
Inputs = str | TokenIds | list[TokenIds] | list[str | ItemFields | Parts] | ItemFields | Parts | WrappedInput
Document = Annotated[str, Field(min_length=1)] | ItemFields


class RequestFields(PromptFields):
    """The fields that every route checks, in this order."""

    on_error: Literal["fail", "report"] | None = None
    """report: an input that cannot be embedded becomes an error at its index; the others are embedded"""
    token_encoding: Encoding | None = None
    """The tokenizer of the ids, if it is not the model's: the ids are decoded to text first"""
    dimensions: Annotated[Sizes, accepts(Size | None)] = None
    """Return this many leading values, normalized again; only for models trained for it"""
    model: str | None = None
    """Any name of a served model; required if several models are served"""
    truncate: Annotated[
        Truncation | None,
        BeforeValidator(_truncation),
        accepts(Truncation | bool | None),
        Expected("'end', 'start', 'none' or a boolean", quoted),
    ] = None
    """Which end of a too long text is cut off; none: reject the text"""
    long_text: Literal["truncate", "mean"] | None = None
    """mean: embed a too long text as the mean of its chunks, weighted by their token counts"""
    priority: Annotated[
        Literal["interactive", "batch"] | None,
        BeforeValidator(_lane),
        accepts(Literal["interactive", "batch"] | int | None),
    ] = None
    """batch: processed after interactive requests"""


class EmbeddingsBody(RequestFields):
    input: Annotated[Any, accepts(Inputs)]
    """One input or a list of inputs"""
    dimensions: Sizes = None
    """Return this many leading values, normalized again; only for models trained for it. A list: a vector per entry"""
    encoding_format: Annotated[
        FloatEncoding | Annotated[list[FloatEncoding | None], Field(min_length=1, max_length=1, fail_fast=True)] | None,
        Expected("either 'float' or 'base64'", quoted),
    ] = None
    """base64: little-endian float32. Integers are always lists"""
    output_dtype: OutputDtype | None = None
    """int8, uint8: value / scale, returned with its scale; binary, ubinary: eight signs per byte"""
    return_receipt: bool | None = None
    """Report tokens, dropped tokens, prompt and reuse of each input"""
    user: Any = None
    """Ignored"""


class EncodeBody(RequestFields):
    text: Annotated[Any, accepts(Texts | None)] = None
    input_ids: Annotated[Any, accepts(TokenIds | list[TokenIds] | None)] = None
    image_data: Annotated[Any, accepts(Image | list[Image | None] | None)] = None


class TokenizeBody(RequestFields):
    model_config = undocumented("on_error", "token_encoding", "dimensions", "truncate", "long_text", "priority")

    prompt: Annotated[Any, accepts(Texts | None)] = None
    input: Annotated[Any, accepts(Texts | None)] = None
    text: Annotated[Any, accepts(Texts | None)] = None
    add_special_tokens: Annotated[Any, accepts(Literal[True] | None)] = None


class RerankBody(RequestFields):
    model_config = undocumented("on_error", "token_encoding")

    documents: Annotated[
        list[Annotated[Any, accepts(Document)]],
        Field(min_length=1),
        Expected("a list of one document or more", _type_or_empty),
    ]
    query: Annotated[
        Any, AfterValidator(_one_input), accepts(Document), Expected("a text or an object", _type_or_empty)
    ]
    top_n: Annotated[int | None, Field(ge=1), Expected("an integer above 0", None)] = None
    """Return only this many of the best documents"""
    return_documents: Annotated[bool | None, Expected("a boolean", None)] = None
    """Whether to return the document of each result"""


class ScoreBody(RequestFields):
    model_config = undocumented("on_error", "token_encoding")

    text_1: TextOrTexts
    text_2: TextOrTexts
