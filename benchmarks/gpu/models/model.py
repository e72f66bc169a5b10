"""Models measured end to end, at their real sizes or tiny in a dry run: their inputs and operations."""

import json
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.shapes import SHAPES, Shape, merged
from triton_embed.kernels import reference
from triton_embed.python_backend.spec import ClipSpec, DecoderSpec, EncoderSpec, Qwen2VLSpec, Spec

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PATCH, MERGE, FRAMES = 14, 2, 2
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Model:
    """A text model to measure; subclasses add image models.

    Attributes:
        name: The shape in `benchmarks.shapes`.
        seconds: Approximate duration of the measurement; with less time left it is skipped.
    """

    name: str
    spec: Spec
    parameters_b: float  # billions
    pooling: str = "last"
    causal: bool = True
    prefix: bool = False  # whether queries with a shared prefix are measured
    seconds: int = 50

    @property
    def text(self) -> bool:
        return True

    @property
    def large(self) -> bool:
        return self.parameters_b > 2.5

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name]

    def sizes(self, dry: bool) -> dict[str, Any]:
        """Return the values of config.json."""
        return merged(self.shape.sizes, self.shape.tiny if dry else {})

    def config(self, dry: bool) -> Any:
        """Create transformers' configuration."""
        config = self.shape.config(**(self.shape.tiny if dry else {}))
        config._attn_implementation = "sdpa"
        return config

    def network(self, config: Any) -> nn.Module:
        """Create transformers' network."""
        network: nn.Module = self.shape.network(config)
        return network

    def flop(self, length: int) -> float:
        """Return the floating-point operations for a text of `length` tokens: all projections, and attention."""
        s = self.shape.sizes
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
        return int(self.sizes(dry)["vision_config"]["image_size"])

    def image_ids(self, dry: bool) -> tuple[Ids, int]:
        vision = self.sizes(dry)["vision_config"]
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
        s = self.sizes(dry)
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


MODELS = (
    Model(
        *("bge-large", EncoderSpec()),
        parameters_b=0.34,
        pooling="cls",
        causal=False,
        seconds=40,
    ),
    Model(
        *("qwen3-0.6b", DecoderSpec(eos="", causal=True, qk_norm=True, qkv_bias=False)),
        parameters_b=0.6,
        prefix=True,
        seconds=60,
    ),
    Clip(
        *("clip-vit-l-14-336", ClipSpec()),
        parameters_b=0.43,
        pooling="projection",
        gflop_per_image=382,
        images=128,
        seconds=40,
    ),
    # Causal, as transformers computes it. The released model is bidirectional; the operations differ by about 1 %.
    Model(
        *("gte-qwen2-1.5b", DecoderSpec(eos="", causal=True, qk_norm=False, qkv_bias=True)),
        parameters_b=1.54,
        prefix=True,
        seconds=70,
    ),
    Gme(
        *("gme-qwen2-vl-2b", Qwen2VLSpec()),
        parameters_b=2.2,
        gflop_per_image=2_237,
        images=32,
        seconds=70,
    ),
    Model(
        *("e5-mistral-7b", DecoderSpec(eos="", causal=True, qk_norm=False, qkv_bias=False)),
        parameters_b=7.1,
        seconds=120,
    ),
    Model(
        *("qwen3-4b", DecoderSpec(eos="", causal=True, qk_norm=True, qkv_bias=False)),
        parameters_b=4.0,
        seconds=90,
    ),
)
