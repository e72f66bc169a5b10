"""Models measured end to end: the released models' sizes, and tiny variants for a dry run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks import checkout

checkout.importable()

from triton_embed.kernels import reference  # noqa: E402
from triton_embed.python_backend.spec import ClipSpec, DecoderSpec, EncoderSpec, Qwen2VLSpec, Spec  # noqa: E402

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PATCH, MERGE, FRAMES = 14, 2, 2
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Model:
    """A text model to measure; subclasses add image models.

    Attributes:
        sizes: Values of config.json that override the config class's defaults.
        tiny: Values that override `sizes` in a dry run.
        seconds: Approximate duration of the measurement; with less time left it is skipped.
    """

    name: str
    spec: Spec
    config_class: str  # of transformers
    network_class: str
    sizes: Mapping[str, Any]
    tiny: Mapping[str, Any]
    parameters_b: float  # billions
    pooling: str = "last"
    causal: bool = True
    prefix: bool = False  # whether queries with a shared prefix are measured
    options: Mapping[str, Any] = field(default_factory=dict)  # of the network class
    seconds: int = 25

    @property
    def text(self) -> bool:
        return True

    @property
    def large(self) -> bool:
        return self.parameters_b > 2.5

    @property
    def model_type(self) -> str:
        return str(_transformers(self.config_class).model_type)

    def config(self, dry: bool) -> Any:
        config = _transformers(self.config_class)(**_merged(self.sizes, self.tiny if dry else {}))
        config._attn_implementation = "sdpa"
        return config

    def network(self, config: Any) -> nn.Module:
        network: nn.Module = _transformers(self.network_class)(config, **self.options)
        return network

    def vocabulary(self, dry: bool) -> int:
        return int((self.tiny if dry else self.sizes)["vocab_size"])

    def flop(self, length: int) -> float:
        """Return the floating-point operations for a text of `length` tokens: all projections, and attention."""
        s = self.sizes
        hidden, inner = s["hidden_size"], s["intermediate_size"]
        heads = s["num_attention_heads"]
        dim = s.get("head_dim", hidden // heads)
        kv_heads = s.get("num_key_value_heads", heads)
        projections = hidden * dim * (2 * heads + 2 * kv_heads) + hidden * inner * (3 if self.causal else 2)
        pairs = length / 2 if self.causal else length
        return float(s["num_hidden_layers"] * length * (2 * projections + 4 * heads * dim * pairs))

    def write_processor(self, directory: Path) -> None:
        """Write preprocessor_config.json; text models have none."""

    # Image models only.
    gflop_per_image: float = 0.0
    images: int = 0

    def side(self, dry: bool) -> int:
        raise NotImplementedError

    def image_ids(self, dry: bool) -> tuple[Ids, int]:
        """Return the token ids of an image input, including placeholders, and the token count of the vision tower."""
        raise NotImplementedError

    def pixels(self, image: Tensor) -> Tensor:
        """Convert a uint8 image [side, side, 3] to transformers' pixel values."""
        raise NotImplementedError

    def image_vectors(self, network: Any, pixels: Tensor, padded: dict[str, Tensor], count: int) -> Tensor:
        """Compute image vectors [count, E] with transformers' network."""
        raise NotImplementedError


@dataclass(frozen=True)
class Clip(Model):
    @property
    def text(self) -> bool:
        return False

    def side(self, dry: bool) -> int:
        return int((self.tiny if dry else self.sizes)["vision_config"]["image_size"])

    def image_ids(self, dry: bool) -> tuple[Ids, int]:
        vision = _merged(self.sizes, self.tiny if dry else {})["vision_config"]
        return np.empty(0, dtype=np.int32), (vision["image_size"] // vision["patch_size"]) ** 2 + 1

    def pixels(self, image: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=image.device) for values in (MEAN, STD))
        return ((image.float() / 255 - mean) / std).permute(2, 0, 1)[None]

    def image_vectors(self, network: Any, pixels: Tensor, padded: dict[str, Tensor], count: int) -> Tensor:
        features = network.get_image_features(pixels)
        vectors: Tensor = features if isinstance(features, Tensor) else features.pooler_output
        return vectors

    def write_processor(self, directory: Path) -> None:
        size = json.loads((directory / "config.json").read_text())["vision_config"]["image_size"]
        settings = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        _write_processor(directory, settings)


@dataclass(frozen=True)
class Gme(Model):
    @property
    def text(self) -> bool:
        return False

    def side(self, dry: bool) -> int:
        return 56 if dry else 448

    def image_ids(self, dry: bool) -> tuple[Ids, int]:
        s = _merged(self.sizes, self.tiny if dry else {})
        patches = (self.side(dry) // PATCH) ** 2
        template = np.arange(5, 29, dtype=np.int32)  # the chat template's tokens
        image_tokens = [
            s["vision_start_token_id"],
            *[s["image_token_id"]] * (patches // MERGE**2),
            s["vision_end_token_id"],
        ]
        return np.concatenate([template[:14], np.array(image_tokens, dtype=np.int32), template[14:]]), patches

    def pixels(self, image: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=image.device) for values in (MEAN, STD))
        return reference.patchify(image, PATCH, MERGE, FRAMES, mean, std)

    def image_vectors(self, network: Any, pixels: Tensor, padded: dict[str, Tensor], count: int) -> Tensor:
        side = round((len(pixels) // count) ** 0.5)
        grid = torch.tensor([[1, side, side]] * count, device=pixels.device)
        image_mask = (padded["input_ids"] == network.config.image_token_id).int()
        # Later versions of transformers 5 require the positions of the image tokens.
        extra_inputs = (
            {"mm_token_type_ids": image_mask} if "mm_token_type_ids" in signature(network.forward).parameters else {}
        )
        output = network(**padded, pixel_values=pixels, image_grid_thw=grid, use_cache=False, **extra_inputs)
        states: Tensor = output.last_hidden_state
        return states[:, -1]

    def write_processor(self, directory: Path) -> None:
        _write_processor(directory, {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": FRAMES})


def _write_processor(directory: Path, settings: dict[str, Any]) -> None:
    common = {"image_mean": MEAN, "image_std": STD, "resample": 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(common | settings))


def _transformers(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _merged(sizes: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two configurations, nested ones included; values in `overrides` win."""
    merged = dict(sizes)
    for key, value in overrides.items():
        merged[key] = _merged(sizes.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


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
}

MODELS = (
    Model(
        *("bge-large", EncoderSpec(), "BertConfig", "BertModel"),
        sizes={
            "vocab_size": 30_522,
            "hidden_size": 1_024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4_096,
        },
        tiny={**_SMALL_TOWER, "vocab_size": 400},
        parameters_b=0.34,
        pooling="cls",
        causal=False,
        options={"add_pooling_layer": False},
        seconds=20,
    ),
    Model(
        *("qwen3-0.6b", DecoderSpec(eos="", causal=True, qk_norm=True, qkv_bias=False), "Qwen3Config", "Qwen3Model"),
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
        parameters_b=0.6,
        prefix=True,
        seconds=30,
    ),
    Clip(
        *("clip-vit-l-14-336", ClipSpec(), "CLIPConfig", "CLIPModel"),
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
        parameters_b=0.43,
        pooling="projection",
        gflop_per_image=382,
        images=128,
        seconds=20,
    ),
    Model(
        # Causal, as transformers computes it. The released model is bidirectional; the operations differ by about 1 %.
        *(
            "gte-qwen2-1.5b",
            DecoderSpec(eos="", causal=True, qk_norm=False, qkv_bias=True),
            "Qwen2Config",
            "Qwen2Model",
        ),
        sizes={**_QWEN2_1_5B, "rope_parameters": _rope(1e6)},
        tiny=_SMALL_DECODER,
        parameters_b=1.54,
        prefix=True,
        seconds=35,
    ),
    Gme(
        *("gme-qwen2-vl-2b", Qwen2VLSpec(), "Qwen2VLConfig", "Qwen2VLModel"),
        sizes={
            "text_config": {
                **_QWEN2_1_5B,
                "vocab_size": 151_936,
                "rope_parameters": {**_rope(1e6), "mrope_section": [16, 24, 24]},
            },
            "vision_config": {"depth": 32, "embed_dim": 1_280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1_536},
            "image_token_id": 151_655,
            "vision_start_token_id": 151_652,
            "vision_end_token_id": 151_653,
        },
        tiny={
            "text_config": {**_SMALL_DECODER, "rope_parameters": {**_rope(1e6), "mrope_section": [2, 3, 3]}},
            "vision_config": {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 64},
            "image_token_id": 399,
            "vision_start_token_id": 398,
            "vision_end_token_id": 397,
        },
        parameters_b=2.2,
        gflop_per_image=2_237,
        images=32,
        seconds=35,
    ),
    Model(
        *("e5-mistral-7b", DecoderSpec(eos="", causal=True, qk_norm=False, qkv_bias=False)),
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
        parameters_b=7.1,
        seconds=60,
    ),
    Model(
        *("qwen3-4b", DecoderSpec(eos="", causal=True, qk_norm=True, qkv_bias=False), "Qwen3Config", "Qwen3Model"),
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
        parameters_b=4.0,
        seconds=45,
    ),
)
