"""Processors: build the network's rows from the inputs of a request (templates, special tokens, images, truncation).

There is one class for text models, one for CLIP's two towers and one for chat models with images among their tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from triton_embed.python_backend.checkpoint.config import ModelConfig, ServingConfig
from triton_embed.python_backend.checkpoint.hf_config import ClipConfig, NetworkConfig, Qwen2VLConfig
from triton_embed.python_backend.errors import BadInput, BadRequest, ConfigError
from triton_embed.python_backend.inputs.images import ClipImageProcessor, Qwen2VLImageProcessor
from triton_embed.python_backend.inputs.parameters import Item
from triton_embed.python_backend.inputs.row import NO_IDS, Ids, Pixels, Row
from triton_embed.python_backend.inputs.tokenizer import Tokenizer
from triton_embed.python_backend.wire import instruction_error, modality_error

MAX_CACHED_PREFIXES = 256  # instructions whose ids are cached
MAX_CACHED_PREFIX_CHARACTERS = 4_096  # instructions come from requests, so the cache must bound their length


@dataclass(frozen=True)
class Template:
    """The format of an item for the tokenizer: prefix, one placeholder per image, text, suffix."""

    prefix: str = ""
    suffix: str = ""
    image_placeholder: str = ""

    def __call__(self, item: Item) -> str:
        """Return the text to encode for an item."""
        return f"{self.prefix}{self.image_placeholder * len(item.images)}{item.text}{self.suffix}"


class TextProcessor:
    """The processor of text models: accepts texts and token ids.

    Args:
        eos: The token that must end every text, see `Spec.eos`.
        prompt: The family's format of an instruction and a text, with {instruction} and {text}; None: the family
            accepts no instruction.

    Raises:
        ConfigError: The tokenizer or preprocessor files do not fit the model.
    """

    modalities: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(
        self,
        directory: Path,
        model: ModelConfig,
        network_config: NetworkConfig,
        serving: ServingConfig,
        eos: str | None,
        prompt: str | None,
    ) -> None:
        self._name = serving.name
        self._model = model
        self._prompt = prompt
        self._query_instruction = serving.query_instruction
        self.tokenizer = Tokenizer(directory, model, eos)
        self._stable_prefix = lru_cache(MAX_CACHED_PREFIXES)(self.tokenizer.stable_prefix)

    @property
    def prompt_names(self) -> list[str]:
        """The valid values of `prompt_name`: the checkpoint's prompts, or query and document if it has none."""
        names = list(self._model.prompts)
        return names or (["query", "document"] if self._prompt and self._query_instruction else [])

    def template(self, parameters: Mapping[str, Any]) -> Template:
        """Build the template for the `instruction` or the `prompt_name` of a request.

        Without either, the template uses the checkpoint's default prompt. An empty prompt_name selects no prompt.

        Raises:
            BadRequest: Both are set, the name is unknown, the instruction is too long, or the model was trained without
                instructions.
        """
        name, instruction = parameters.get("prompt_name"), parameters.get("instruction")
        if instruction and (message := instruction_error(instruction)):
            raise BadRequest(message)
        if name is None:
            if instruction is not None:
                return self._instruction_template(instruction) if instruction else self._plain_template()
            name = self._model.default_prompt or ""
        elif instruction is not None:
            raise BadRequest("Send either instruction or prompt_name")
        if not name:
            return self._plain_template()
        if name not in self.prompt_names:
            available = ", ".join(self.prompt_names) or "none"
            raise BadRequest(f"Model '{self._name}' has no prompt_name '{name}'; it has: {available}")
        if name in self._model.prompts:
            return self._prompt_template(self._model.prompts[name])
        return self._instruction_template(self._query_instruction) if name == "query" else self._plain_template()

    def check(self, item: Item, index: int) -> None:
        """Check that the model accepts this kind of item.

        Raises:
            BadInput: The item is empty or has a modality that the model does not support.
        """
        if message := modality_error(self._name, self.modalities, bool(item.text), len(item.images)):
            raise BadInput(index, "unsupported_input", message)
        if not item.text and not item.images:
            raise BadInput(index, "empty", "Input cannot be empty or whitespace only")

    def has_ids(self, item: Item) -> bool:
        """Return whether the row of an item consists of token ids, encoded from its template."""
        return True

    def decode_image(self, data: bytes, index: int) -> Pixels:
        """Decode an image file to pixels of the size that the vision tower needs.

        Raises:
            BadInput: The image cannot be read.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no images")  # `check` refuses them

    def build_row(self, ids: Ids, images: tuple[Pixels, ...], template: Template, truncate: str, index: int) -> Row:
        """Build the row of an item.

        Args:
            ids: The encoded text of the item in its template; empty if the item has no ids.
            images: The decoded images of the item.
            template: The template of the item.
            truncate: "end", "start" or "none", see `Tokenizer.truncate`.
            index: The index of the input in the request, for error messages.

        Raises:
            BadInput: The item is too long and must not or cannot be truncated.
        """
        return self.tokenizer.truncate_text(ids, truncate, index, template.prefix)

    def check_token_ids(self, ids: Ids, index: int) -> Ids:
        """Return token ids from the request in the form that the network needs, after checking them.

        Raises:
            BadInput: `ids` is empty, or the network does not accept one of them.
        """
        return self.tokenizer.check_ids(ids, index)

    def row_from_ids(self, ids: Ids, truncate: str, index: int) -> Row:
        """Build the row of token ids from the request.

        Raises:
            BadInput: The ids are not accepted, or are too long with `truncate` "none".
        """
        return self.tokenizer.truncate_token_ids(self.check_token_ids(ids, index), truncate, index)

    def mark_shared_prefix(self, row: Row, template: Template) -> Row:
        """Return the row with the number of its leading ids that come from the template."""
        if len(template.prefix) > MAX_CACHED_PREFIX_CHARACTERS:
            return row
        prefix = self._stable_prefix(template.prefix)
        is_shared = 0 < len(prefix) < len(row.ids) and np.array_equal(row.ids[: len(prefix)], prefix)
        return replace(row, shared_prefix_tokens=len(prefix)) if is_shared else row

    def _plain_template(self) -> Template:
        return Template()

    def _prompt_template(self, prompt: str) -> Template:
        return Template(prompt)

    def _instruction_template(self, instruction: str) -> Template:
        if self._prompt is None:
            raise BadRequest(f"Model '{self._name}' takes no instruction: it was trained without one")
        prefix, suffix = self._prompt.split("{text}")
        prefix = prefix.replace("{instruction}", instruction)
        return Template(prefix, suffix)


class ClipProcessor(TextProcessor):
    """The processor of CLIP: a row is a text or an image.

    A text ends at the token that is pooled, because attention is causal and later tokens have no effect.
    """

    modalities = ("text", "image")

    def __init__(
        self,
        directory: Path,
        model: ModelConfig,
        network_config: ClipConfig,
        serving: ServingConfig,
        eos: str | None,
        prompt: None,
    ) -> None:
        super().__init__(directory, model, network_config, serving, eos, prompt)
        self._network_config = network_config
        self._image_processor = ClipImageProcessor.from_checkpoint(directory)
        size = network_config.image_size
        if self._image_processor.crop != (size, size):
            raise ConfigError(
                f"{directory}: the image processor's crop_size is {self._image_processor.crop}, "
                f"config.json says image_size {size}"
            )

    def has_ids(self, item: Item) -> bool:
        return bool(item.text)

    def decode_image(self, data: bytes, index: int) -> Pixels:
        return self._image_processor.read(data, index)

    def build_row(self, ids: Ids, images: tuple[Pixels, ...], template: Template, truncate: str, index: int) -> Row:
        if images:
            return Row(NO_IDS, images, self._network_config.vision_tokens)
        row = super().build_row(ids, images, template, truncate, index)
        return replace(row, ids=self._cut_after_end_of_text(row.ids, index))

    def check_token_ids(self, ids: Ids, index: int) -> Ids:
        return self._cut_after_end_of_text(super().check_token_ids(ids, index), index)

    def _cut_after_end_of_text(self, ids: Ids, index: int) -> Ids:
        """Return the ids up to and including the end-of-text token, located by transformers' rule."""
        end_of_text = self._network_config.end_of_text
        if end_of_text is None:
            return ids[: int(ids.argmax()) + 1]
        positions = np.flatnonzero(ids == end_of_text)
        if not len(positions):
            message = f"Input has no end-of-text token ({end_of_text}); the model pools at that token"
            raise BadInput(index, "invalid_token_id", message)
        return ids[: positions[0] + 1]


class ChatProcessor(TextProcessor):
    """The processor of chat models with images: a row is one chat turn of images and text.

    Every input gets the family's template: `prompt` contains {instruction}, {images} and {text}. Each image has one
    `image_placeholder`, whose <|image_pad|> is repeated for every token of the image.
    """

    modalities = ("text", "image", "text+image")
    image_placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    default_instruction = "You are a helpful assistant."

    def __init__(
        self,
        directory: Path,
        model: ModelConfig,
        network_config: Qwen2VLConfig,
        serving: ServingConfig,
        eos: None,
        prompt: str,
    ) -> None:
        super().__init__(directory, model, network_config, serving, eos, prompt)
        self._network_config = network_config
        self._image_processor = Qwen2VLImageProcessor.from_checkpoint(
            directory, serving.min_image_tokens, serving.max_image_tokens
        )
        for name, actual, expected in (
            ("patch_size", self._image_processor.patch_size, network_config.patch_size),
            ("merge_size", self._image_processor.merge_size, network_config.merge),
            ("temporal_patch_size", self._image_processor.frames, network_config.frames),
        ):
            if actual != expected:
                raise ConfigError(f"{directory}: the image processor's {name} is {actual}, config.json says {expected}")
        self._head, self._tail = prompt.split("{images}{text}")
        self._tail_tokens = self.tokenizer.count_tokens(self._tail)
        turn_start = self._head.rindex("<|im_start|>")
        self._turn_header_tokens = self.tokenizer.count_tokens(self._head[turn_start:])

    def decode_image(self, data: bytes, index: int) -> Pixels:
        return self._image_processor.read(data, index)

    def build_row(self, ids: Ids, images: tuple[Pixels, ...], template: Template, truncate: str, index: int) -> Row:
        image_tokens = [self._image_tokens(image) for image in images]
        placeholders = np.flatnonzero(ids == self._network_config.image_token)
        if len(placeholders) != len(images):
            message = "Input has <|image_pad|> in its text, which is reserved for images"
            raise BadInput(index, "invalid_text", message)
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[placeholders] = image_tokens
        ids = np.repeat(ids, repeats)
        # The text begins after <|vision_end|> of the last image, or after the template's head.
        image_offsets = np.flatnonzero(ids == self._network_config.image_token)
        head = int(image_offsets[-1]) + 2 if len(image_offsets) else self._head_tokens(ids)
        row = self.tokenizer.truncate(ids, truncate, index, head, self._tail_tokens)
        return Row(row.ids, images, sum(image_tokens) * self._network_config.merge**2, row.dropped)

    def check_token_ids(self, ids: Ids, index: int) -> Ids:
        if (ids == self._network_config.image_token).any():
            raise BadInput(
                index,
                "invalid_token_id",
                f"Input has token id {self._network_config.image_token}, which is reserved for images; send the image "
                "itself",
            )
        return super().check_token_ids(ids, index)

    def _plain_template(self) -> Template:
        return self._instruction_template(self.default_instruction)

    def _prompt_template(self, prompt: str) -> Template:
        return self._instruction_template(prompt)

    def _instruction_template(self, instruction: str) -> Template:
        if "<|im_start|>" in instruction:
            raise BadRequest("instruction must not contain <|im_start|>, which starts a chat turn")
        return Template(self._head.replace("{instruction}", instruction), self._tail, self.image_placeholder)

    def _image_tokens(self, image: Pixels) -> int:
        """Return the number of decoder tokens of an image."""
        token_side = self._network_config.patch_size * self._network_config.merge
        return image.shape[0] // token_side * (image.shape[1] // token_side)

    def _head_tokens(self, ids: Ids) -> int:
        """Return the number of tokens before the text: those up to and including the header of the second chat turn."""
        turn_starts = np.flatnonzero(ids == ids[0])  # a chat starts with <|im_start|>, as every turn does
        return int(turn_starts[1]) + self._turn_header_tokens
