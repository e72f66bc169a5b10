"""What the weights of a family demand: facts no checkpoint file states. No torch here, so that a family
without a checkpoint costs nothing."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from triton_embed.python_backend.json_file import JsonFile
from triton_embed.python_backend.row import Channels
from triton_embed.python_backend.shapes import ClipShape, DecoderShape, EncoderShape, Qwen2VLShape, Shape


@dataclass(frozen=True)
class Spec:
    """What every family says of its weights.

    `eos`: the token that every text ends with, appended where the tokenizer's post-processor does not do it:
    a token, or "eos_token" for the one tokenizer_config.json names so; None: as tokenizer.json has it.
    """

    network: ClassVar[str]  # module.Class in this folder
    reader: ClassVar[str] = "reader.Reader"  # what turns a request's rows into the network's
    pooling: ClassVar[str | None] = None  # None: the checkpoint or the operator says
    eos: str | None = None

    def read(self, config: JsonFile) -> Shape:
        """The network's shape, from config.json. ConfigError: it does not fit the family."""
        raise NotImplementedError

    def normalisation(self, directory: Path) -> tuple[Channels, ...]:
        """Mean and standard deviation of a pixel, by channel; nothing for models that read no pictures."""
        return ()

    def load(self, name: str) -> Any:
        """`network` or `reader` itself; only this imports torch."""
        module, attribute = name.split(".")
        return getattr(import_module(f"triton_embed.python_backend.{module}"), attribute)


@dataclass(frozen=True)
class EncoderSpec(Spec):
    """A bidirectional post-norm encoder with learned positions (BERT, XLM-RoBERTa)."""

    network = "encoder.Encoder"

    def read(self, config: JsonFile) -> EncoderShape:
        return EncoderShape.read(config)


@dataclass(frozen=True, kw_only=True)
class DecoderSpec(Spec):
    """A pre-norm decoder with rotary positions (Llama, Mistral, Qwen2, Qwen3)."""

    network = "decoder.Decoder"
    eos: str
    causal: bool | None  # None: config.json says it, in is_causal
    qk_norm: bool  # an RMSNorm inside each query and key head
    qkv_bias: bool

    def read(self, config: JsonFile) -> DecoderShape:
        return DecoderShape.read(config, causal=self.causal, qk_norm=self.qk_norm, qkv_bias=self.qkv_bias)


@dataclass(frozen=True)
class ClipSpec(Spec):
    """Two towers, one for texts and one for images, that project into one space."""

    network = "clip.Clip"
    reader = "reader.ClipReader"
    pooling = "projection"  # of the end-of-text token and of the class token

    def read(self, config: JsonFile) -> ClipShape:
        return ClipShape.read(config)

    def normalisation(self, directory: Path) -> tuple[Channels, ...]:
        from triton_embed.python_backend.images import ClipImages

        images = ClipImages.from_checkpoint(directory)
        return images.mean, images.std


@dataclass(frozen=True)
class Qwen2VLSpec(Spec):
    """A causal decoder that reads the merged patches of a vision tower among its tokens."""

    network = "qwen2_vl.Qwen2VL"
    reader = "reader.ChatReader"

    def read(self, config: JsonFile) -> Qwen2VLShape:
        return Qwen2VLShape.read(config)

    def normalisation(self, directory: Path) -> tuple[Channels, ...]:
        from triton_embed.python_backend.images import Qwen2VLImages

        images = Qwen2VLImages.from_checkpoint(directory, 1, 1)
        return images.mean, images.std
