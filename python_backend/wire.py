"""The contract between the engine and the gateway: names, parameters, codes, INFO, errors of inputs, and shared rules.

To serve requests the gateway imports this file of the engine and no other; its commands also read checkpoints. The
file needs the standard library only, because the gateway runs without torch.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Literal, get_args

# Input tensors
TEXT = "TEXT"
IMAGE = "IMAGE"
INPUT_IDS = "INPUT_IDS"

# Output tensors
EMBEDDING = "EMBEDDING"
TOKENS = "TOKENS"
DROPPED = "DROPPED"
REUSED = "REUSED"
ERROR = "ERROR"
INFO = "INFO"
IDS = "IDS"

# Request parameters and their types
PARAMETERS: dict[str, type] = {
    "dimensions": int,
    "instruction": str,
    "prompt_name": str,
    "prompts": str,
    "truncate": str,
    "long_text": str,
    "on_error": str,
    "error_format": str,
    "timeout_ms": int,
}
# Values of the parameters that accept a fixed set; the first is the default.
Truncate = Literal["end", "start", "none"]
LongText = Literal["truncate", "mean"]
OnError = Literal["fail", "report"]
ErrorFormat = Literal["text", "json"]  # of an InputError, as the error of the response or as a cell of ERROR
CHOICES: dict[str, tuple[str, ...]] = {
    "truncate": get_args(Truncate),
    "long_text": get_args(LongText),
    "on_error": get_args(OnError),
    "error_format": get_args(ErrorFormat),
}
PROMPT_KEYS = ("instruction", "prompt_name")  # an entry of prompts may have one of these keys
MAX_INSTRUCTION = 2**16  # characters: an instruction is put before each text and tokenized with it
# Requests without a response above which a model refuses further ones. The limit is not Triton's `max_queue_size`,
# because a queue policy turns off the prefetching of batches: Triton's batcher then misses the end of `execute`, and
# what arrived meanwhile waits for the next arrival, or 500 ms (core, src/dynamic_batch_scheduler.cc,
# WaitForPayloadSlotAvailable).
MAX_REQUESTS = 256
QUEUE_FULL = "Exceeds maximum queue size"  # the message; Triton has the same for its own limit


class Reused(IntEnum):
    """Values of REUSED: where the vector of an input came from, most expensive source first."""

    COMPUTED = 0  # for this request
    IN_FLIGHT = 1  # shared with an identical row of this request or of another one
    CACHED = 2


InputErrorCode = Literal[
    "empty",
    "invalid_text",
    "invalid_token_id",
    "invalid_image",
    "invalid_prompt",
    "too_long",
    "unsupported_input",  # the model takes no input of this kind
]


@dataclass(frozen=True)
class InputError:
    """Why one input is refused.

    Attributes:
        index: The index of the input in its call.
        message: A sentence without the index. It begins with "Input" if the input is its subject.
    """

    index: int
    code: InputErrorCode
    message: str

    @property
    def text(self) -> str:
        """The message with the index: "Input at index 3 cannot be empty" or "Model 'm' … (input at index 3)"."""
        if self.message.startswith(("Input ", "Input:")):
            return f"Input at index {self.index}{self.message.removeprefix('Input')}"
        return f"{self.message} (input at index {self.index})"

    def write(self, error_format: ErrorFormat) -> str:
        """Return the error in the form of the parameter `error_format`."""
        return self.to_json() if error_format == "json" else self.text

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "InputError | None":
        """Return the error that `to_json` wrote, or None for any other text."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None


@dataclass(frozen=True)
class ModelInfo:
    """What a model reports about itself in INFO, as JSON.

    Raises:
        ValueError: A size is not positive.
    """

    name: str
    family: str
    checkpoint: str | None  # a Hugging Face id
    dimensions: int
    max_model_len: int  # tokens
    vocab_size: int
    pooling: str
    modalities: tuple[str, ...]  # text, image, and text+image: all texts and images of one input in one vector
    matryoshka: bool | tuple[int, ...] | None  # true: any number of dimensions up to `dimensions`
    instructions: bool
    prompt_names: tuple[str, ...]
    default_prompt_name: str | None  # for requests that select no prompt
    batch_tokens: int  # per forward pass
    small_tokens: int  # largest job that is computed before larger ones
    max_request_tokens: int
    dtype: str
    device: str
    kernels: str
    instances: int  # processes that compute, each with a queue of its own

    def __post_init__(self) -> None:
        for name in ("dimensions", "max_model_len", "vocab_size", "batch_tokens", "max_request_tokens", "instances"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be positive, got {size}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))


# Rules that the gateway and the engine both check. Each returns an error message, or None if the arguments are valid.


def dimensions_error(dimensions: int, model: ModelInfo) -> str | None:
    """Check the dimensions that a request asks for, by SGLang's rules and with its messages."""
    if dimensions == model.dimensions:
        return None
    if dimensions < 1:
        return "Requested dimensions must be greater than 0"
    if dimensions > model.dimensions:
        return f"Provided dimensions are greater than max embedding dimension: {model.dimensions}"
    if not model.matryoshka:
        return (
            f"Model '{model.name}' does not support matryoshka representation, "
            "changing output dimensions will lead to poor results."
        )
    if isinstance(model.matryoshka, tuple) and dimensions not in model.matryoshka:
        return (
            f"Model '{model.name}' only supports {list(model.matryoshka)} matryoshka dimensions, "
            "using other output dimensions will lead to poor results."
        )
    return None


def vocabulary_error(ids: Iterable[int], lowest: int, highest: int, vocab_size: int) -> str | None:
    """Check the token ids of an input, all of which are between `lowest` and `highest`.

    The extremes are passed in, because numpy finds those of an array faster than a loop over `ids`.
    """
    if lowest >= 0 and highest < vocab_size:
        return None
    outside = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
    return f"Input has token id {outside}, which is outside the model's vocabulary (0 to {vocab_size - 1})"


def length_error(tokens: int, max_tokens: int) -> str | None:
    """Check the length of an input that must not be truncated."""
    return None if tokens <= max_tokens else length_message(str(tokens), max_tokens)


def length_message(tokens: str, max_tokens: int) -> str:
    """Return the message for an input of that many tokens, which must not be truncated."""
    return f"The input ({tokens} tokens) is longer than the model's context length ({max_tokens} tokens)."


def instruction_error(instruction: str) -> str | None:
    """Check the length of an instruction."""
    if len(instruction) <= MAX_INSTRUCTION:
        return None
    return f"instruction has {len(instruction)} characters, more than {MAX_INSTRUCTION}"


def modality_error(model: str, modalities: Collection[str], has_text: bool, image_count: int) -> str | None:
    """Check the texts and images of an input against the modalities of ModelInfo."""
    if image_count and "image" not in modalities:
        return f"Model '{model}' takes no images"
    if "text+image" in modalities:
        return None
    if image_count and has_text:
        return f"Model '{model}' embeds a text or an image, not both together"
    if image_count > 1:
        return f"Model '{model}' embeds one image at a time"
    return None
