"""The contract between the engine and the gateway: names, parameters, codes, INFO, errors of inputs, and shared rules.

The gateway imports this file of the engine and no other. It needs the standard library only, because the gateway runs
without torch.
"""

import json
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Literal

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
# Parameters with a fixed set of values; the first is the default.
CHOICES = {
    "truncate": ("end", "start", "none"),
    "long_text": ("truncate", "mean"),
    "on_error": ("fail", "report"),
    "error_format": ("text", "json"),  # of an InputError, as the error of the response or as a cell of ERROR
}
PROMPT_KEYS = ("instruction", "prompt_name")  # keys of an entry of prompts, which may have one of them


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
        """The message with the index: "Input at index 3 cannot be empty", or "Model 'm' … (input at index 3)"."""
        if self.message.startswith(("Input ", "Input:")):
            return f"Input at index {self.index}{self.message.removeprefix('Input')}"
        return f"{self.message} (input at index {self.index})"

    def write(self, error_format: str) -> str:
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
    default_prompt_name: str | None  # of texts for which the caller names no prompt
    batch_tokens: int  # per forward pass
    small_tokens: int  # largest job that is computed before larger ones
    max_request_tokens: int
    dtype: str
    device: str
    kernels: str

    def __post_init__(self) -> None:
        for name in ("dimensions", "max_model_len", "vocab_size", "batch_tokens", "max_request_tokens"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be positive, got {size}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))
