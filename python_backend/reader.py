"""Reader: what a caller sent -> the rows of the network: templates, special tokens, pictures, truncation.

One for text models, one for CLIP's two towers, one for models that read pictures among the tokens of a chat.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from triton_embed.python_backend.config import ModelConfig, ServingConfig
from triton_embed.python_backend.errors import BadRequest, ConfigError
from triton_embed.python_backend.images import ClipImages, Qwen2VLImages
from triton_embed.python_backend.request import Item
from triton_embed.python_backend.row import NO_IDS, Ids, Pixels, Row
from triton_embed.python_backend.shapes import ClipShape, Qwen2VLShape, Shape
from triton_embed.python_backend.tokenizer import Tokenizer

OPENINGS = 256  # instructions whose ids are remembered
LONGEST_OPENING = 4_096  # characters: a caller's, and memory is ours


@dataclass(frozen=True)
class Template:
    """How an item is written for the tokenizer: its images, then its text, between these."""

    before: str = ""
    after: str = ""
    image: str = ""  # what stands for one

    def __call__(self, item: Item) -> str:
        return f"{self.before}{self.image * len(item.images)}{item.text}{self.after}"


class Reader:
    """Texts and token ids. `prompt` is how the family puts an instruction and a text together; None: it takes none.

    ConfigError: tokenizer or preprocessor files that do not fit the model.
    """

    modalities: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(
        self,
        directory: Path,
        model: ModelConfig,
        shape: Shape,
        serving: ServingConfig,
        eos: str | None,
        prompt: str | None,
    ) -> None:
        self._name = serving.name
        self._model = model
        self._prompt = prompt
        self._query = serving.query_instruction
        self.tokenizer = Tokenizer(directory, model, eos)
        self._opening = lru_cache(OPENINGS)(self.tokenizer.opening)

    @property
    def prompt_names(self) -> list[str]:
        """What `prompt_name` may be: the checkpoint's own prompts, else the family's way with queries."""
        own = list(self._model.prompts)
        return own or (["query", "document"] if self._prompt and self._query else [])

    def template(self, parameters: Mapping[str, Any]) -> Template:
        """How the text of an item is written for the tokenizer, by an instruction or a prompt_name.

        Neither: with the prompt that the checkpoint uses by default. An empty prompt_name: with none at all.
        BadRequest: both, an unknown name, or an instruction for a model that was trained without.
        """
        name, instruction = parameters.get("prompt_name"), parameters.get("instruction")
        if name is None:
            if instruction is not None:
                return self._instruct(instruction) if instruction else self._plain()
            name = self._model.default_prompt or ""
        elif instruction is not None:
            raise BadRequest("Send either instruction or prompt_name")
        if not name:
            return self._plain()
        if name not in self.prompt_names:
            known = ", ".join(self.prompt_names) or "none"
            raise BadRequest(f"Model '{self._name}' has no prompt_name '{name}'; it has: {known}")
        if name in self._model.prompts:
            return self._named(self._model.prompts[name])
        return self._instruct(self._query) if name == "query" else self._plain()

    def check(self, item: Item, index: int) -> None:
        """BadRequest: an item that the model cannot take."""
        if item.images:
            raise BadRequest(f"Model '{self._name}' takes no images (input at index {index})")
        if not item.text:
            raise BadRequest(f"Input at index {index} cannot be empty or whitespace only")

    def has_ids(self, item: Item) -> bool:
        """Whether the row of an item is made of token ids, of its template."""
        return True

    def picture(self, data: bytes, index: int) -> Pixels:
        """An encoded image as the vision tower wants it. BadRequest: it cannot be read."""
        raise BadRequest(f"Model '{self._name}' takes no images (input at index {index})")

    def row(self, ids: Ids, pictures: tuple[Pixels, ...], template: Template, truncate: str, index: int) -> Row:
        """The row of an item: `ids` is how it was written in its template, none where it has no ids."""
        return self.tokenizer.cut_text(ids, truncate, index, template.before)

    def own_ids(self, ids: Ids, index: int) -> Ids:
        """The token ids that the caller made, as the network takes them. BadRequest: one that it cannot take."""
        return self.tokenizer.check_ids(ids, index)

    def ids_row(self, ids: Ids, truncate: str, index: int) -> Row:
        """The row of token ids that the caller made. BadRequest: one that the network cannot take."""
        return self.tokenizer.cut_ids(self.own_ids(ids, index), truncate, index)

    def share(self, row: Row, template: Template) -> Row:
        """The row, saying how many of its ids are the template's."""
        if len(template.before) > LONGEST_OPENING:
            return row
        opening = self._opening(template.before)
        begins = 0 < len(opening) < len(row.ids) and np.array_equal(row.ids[: len(opening)], opening)
        return replace(row, shared=len(opening)) if begins else row

    def _plain(self) -> Template:
        return Template()

    def _named(self, prompt: str) -> Template:
        return Template(prompt)

    def _instruct(self, instruction: str) -> Template:
        if self._prompt is None:
            raise BadRequest(f"Model '{self._name}' takes no instruction: it was trained without one")
        before, after = self._prompt.split("{text}")
        before = before.replace("{instruction}", instruction)
        return Template(before, after)


class ClipReader(Reader):
    """A row is a text or a picture. A text ends at the token that is pooled: nothing after it is ever looked at."""

    modalities = ("text", "image")

    def __init__(
        self,
        directory: Path,
        model: ModelConfig,
        shape: ClipShape,
        serving: ServingConfig,
        eos: str | None,
        prompt: None,
    ) -> None:
        super().__init__(directory, model, shape, serving, eos, prompt)
        self._shape = shape
        self._images = ClipImages.from_checkpoint(directory)
        size = shape.image_size
        if self._images.crop != (size, size):
            raise ConfigError(
                f"{directory}: the image processor's crop_size is {self._images.crop}, "
                f"config.json says image_size {size}"
            )

    def check(self, item: Item, index: int) -> None:
        if item.text and item.images:
            raise BadRequest(
                f"Model '{self._name}' embeds a text or an image, not both together (input at index {index})"
            )
        if len(item.images) > 1:
            raise BadRequest(f"Model '{self._name}' embeds one image at a time (input at index {index})")
        if not item.text and not item.images:
            raise BadRequest(f"Input at index {index} cannot be empty or whitespace only")

    def has_ids(self, item: Item) -> bool:
        return bool(item.text)

    def picture(self, data: bytes, index: int) -> Pixels:
        return self._images.read(data, index)

    def row(self, ids: Ids, pictures: tuple[Pixels, ...], template: Template, truncate: str, index: int) -> Row:
        if pictures:
            return Row(NO_IDS, pictures, self._shape.vision_tokens)
        fitted = super().row(ids, pictures, template, truncate, index)
        return replace(fitted, ids=self._to_end(fitted.ids, index))

    def own_ids(self, ids: Ids, index: int) -> Ids:
        return self._to_end(super().own_ids(ids, index), index)

    def _to_end(self, ids: Ids, index: int) -> Ids:
        """Up to the end-of-text token as transformers finds it."""
        end = self._shape.end_of_text
        if end is None:
            return ids[: int(ids.argmax()) + 1]
        places = np.flatnonzero(ids == end)
        if not len(places):
            raise BadRequest(f"Input at index {index} has no end-of-text token ({end}), whose place is what is pooled")
        return ids[: places[0] + 1]


class ChatReader(Reader):
    """A row is a chat turn: pictures, then text, in the family's template, which every input gets.

    `prompt` holds {instruction}, {images} and {text}; `image` stands for a picture and is repeated for each of its
    tokens.
    """

    modalities = ("text", "image", "text+image")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    default_instruction = "You are a helpful assistant."

    def __init__(
        self, directory: Path, model: ModelConfig, shape: Qwen2VLShape, serving: ServingConfig, eos: None, prompt: str
    ) -> None:
        super().__init__(directory, model, shape, serving, eos, prompt)
        self._shape = shape
        self._images = Qwen2VLImages.from_checkpoint(directory, serving.min_image_tokens, serving.max_image_tokens)
        for name, found, wanted in (
            ("patch_size", self._images.patch_size, self._shape.patch_size),
            ("merge_size", self._images.merge_size, self._shape.merge),
            ("temporal_patch_size", self._images.frames, self._shape.frames),
        ):
            if found != wanted:
                raise ConfigError(f"{directory}: the image processor's {name} is {found}, config.json says {wanted}")
        self._head, self._tail = prompt.split("{images}{text}")
        self._tail_tokens = self.tokenizer.count(self._tail)
        turn = self._head.rindex("<|im_start|>")
        self._opening_tokens = self.tokenizer.count(self._head[turn:])

    def check(self, item: Item, index: int) -> None:
        if not item.text and not item.images:
            raise BadRequest(f"Input at index {index} cannot be empty or whitespace only")

    def picture(self, data: bytes, index: int) -> Pixels:
        return self._images.read(data, index)

    def row(self, ids: Ids, pictures: tuple[Pixels, ...], template: Template, truncate: str, index: int) -> Row:
        tokens = [self._tokens(picture) for picture in pictures]
        places = np.flatnonzero(ids == self._shape.image_token)
        if len(places) != len(pictures):
            raise BadRequest(f"Input at index {index} has <|image_pad|> in its text, which stands for an image")
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[places] = tokens
        ids = np.repeat(ids, repeats)
        # The text begins after the last picture and the token that ends it, or after the template's head.
        last = np.flatnonzero(ids == self._shape.image_token)
        head = int(last[-1]) + 2 if len(last) else self._head_tokens(ids)
        fitted = self.tokenizer.cut(ids, truncate, index, head, self._tail_tokens)
        return Row(fitted.ids, pictures, sum(tokens) * self._shape.merge**2, fitted.dropped)

    def own_ids(self, ids: Ids, index: int) -> Ids:
        if (ids == self._shape.image_token).any():
            raise BadRequest(
                f"Input at index {index} has token id {self._shape.image_token}, which stands for an image: send the "
                "image itself"
            )
        return super().own_ids(ids, index)

    def _plain(self) -> Template:
        return self._instruct(self.default_instruction)

    def _named(self, prompt: str) -> Template:
        return self._instruct(prompt)

    def _instruct(self, instruction: str) -> Template:
        if "<|im_start|>" in instruction:
            raise BadRequest("instruction has <|im_start|> in it, which starts a turn of the chat")
        return Template(self._head.replace("{instruction}", instruction), self._tail, self.image)

    def _tokens(self, picture: Pixels) -> int:
        """Tokens of the text decoder that a picture becomes."""
        side = self._shape.patch_size * self._shape.merge
        return picture.shape[0] // side * (picture.shape[1] // side)

    def _head_tokens(self, ids: Ids) -> int:
        """Tokens before the text: up to the second start of a turn, and that turn's opening."""
        starts = np.flatnonzero(ids == ids[0])
        return int(starts[1]) + self._opening_tokens
