"""Specs of the model families: properties of the weights that no checkpoint file declares.

This module does not import torch, so that a family without a checkpoint starts quickly and uses little memory.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from triton_embed.python_backend.checkpoint.hf_config import (
    ClipConfig,
    DecoderConfig,
    EncoderConfig,
    NetworkConfig,
    Qwen2VLConfig,
)
from triton_embed.python_backend.checkpoint.json_file import JsonFile
from triton_embed.python_backend.inputs.row import Channels


@dataclass(frozen=True)
class Spec:
    """The base class of all specs: one per network architecture, with values that a family sets in `1/model.py`.

    Attributes:
        eos: The token that must end every text; the tokenizer appends it if the post-processor in tokenizer.json does
            not. "eos_token" selects the `eos_token` of tokenizer_config.json. None leaves texts as tokenizer.json
            encodes them.
    """

    network: ClassVar[str]  # module.Class in this package
    processor: ClassVar[str] = "inputs.processors.TextProcessor"  # builds the network's rows from inputs
    pooling: ClassVar[str | None] = None  # None: the checkpoint or the operator decides
    eos: str | None = None

    def read_config(self, config: JsonFile) -> NetworkConfig:
        """Read the network's configuration from config.json.

        Raises:
            ConfigError: A value is missing or does not fit the family.
        """
        raise NotImplementedError

    def image_normalization(self, directory: Path) -> tuple[Channels, ...]:
        """Return the per-channel mean and standard deviation of the pixels; empty for models without images."""
        return ()

    def load(self, name: str) -> Any:
        """Import the class that `network` or `processor` names; this imports torch."""
        module, _, attribute = name.rpartition(".")
        return getattr(import_module(f"triton_embed.python_backend.{module}"), attribute)


@dataclass(frozen=True)
class EncoderSpec(Spec):
    """The spec of bidirectional post-norm encoders with learned positions (BERT, XLM-RoBERTa)."""

    network = "networks.encoder.Encoder"

    def read_config(self, config: JsonFile) -> EncoderConfig:
        return EncoderConfig.read(config)


@dataclass(frozen=True, kw_only=True)
class DecoderSpec(Spec):
    """The spec of pre-norm decoders with rotary positions (Llama, Mistral, Qwen2, Qwen3)."""

    network = "networks.decoder.Decoder"
    eos: str
    causal: bool | None  # None: is_causal of config.json decides
    qk_norm: bool  # whether each query and key head has an RMSNorm
    qkv_bias: bool

    def read_config(self, config: JsonFile) -> DecoderConfig:
        return DecoderConfig.read(config, causal=self.causal, qk_norm=self.qk_norm, qkv_bias=self.qkv_bias)


@dataclass(frozen=True)
class ClipSpec(Spec):
    """The spec of CLIP: a text tower and an image tower that project into one vector space."""

    network = "networks.clip.Clip"
    processor = "inputs.processors.ClipProcessor"
    pooling = "projection"  # of the end-of-text token and of the class token

    def read_config(self, config: JsonFile) -> ClipConfig:
        return ClipConfig.read(config)

    def image_normalization(self, directory: Path) -> tuple[Channels, ...]:
        from triton_embed.python_backend.inputs.images import ClipImageProcessor

        images = ClipImageProcessor.from_checkpoint(directory)
        return images.mean, images.std


@dataclass(frozen=True)
class Qwen2VLSpec(Spec):
    """The spec of Qwen2-VL: a causal decoder with the merged patches of a vision tower among its tokens."""

    network = "networks.qwen2_vl.Qwen2VL"
    processor = "inputs.processors.ChatProcessor"

    def read_config(self, config: JsonFile) -> Qwen2VLConfig:
        return Qwen2VLConfig.read(config)

    def image_normalization(self, directory: Path) -> tuple[Channels, ...]:
        from triton_embed.python_backend.inputs.images import Qwen2VLImageProcessor

        images = Qwen2VLImageProcessor.from_checkpoint(directory, 1, 1)
        return images.mean, images.std
