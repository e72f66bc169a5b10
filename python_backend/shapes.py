"""The shape of each network, read from config.json: the one place that knows transformers' names for sizes.

Sizes in elements, lengths in tokens. Where transformers writes only what differs from a class's own default (nested
configs), that default stands here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.json_file import JsonFile

# config.json's names for activations -> kernels.ops names
_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


@dataclass(frozen=True)
class EncoderShape:
    """BERT and XLM-RoBERTa: learned positions, post-norm."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    positions: int  # rows of the position table
    first_position: int  # the row of the first token: RoBERTa counts from padding_idx + 1
    token_types: int
    norm_eps: float
    activation: str

    @property
    def max_tokens(self) -> int:
        return self.positions - self.first_position

    @classmethod
    def read(cls, config: JsonFile) -> "EncoderShape":
        if config.get("position_embedding_type", str, "absolute") != "absolute":
            raise config.refuse("position_embedding_type", "only 'absolute' is implemented")
        roberta = config.need("model_type", str) in ("roberta", "xlm-roberta")
        hidden, heads = _heads(config)
        positions, first = config.size("max_position_embeddings"), config.size("pad_token_id") + 1 if roberta else 0
        if first >= positions:
            raise config.refuse("pad_token_id", f"beyond the {positions} positions there are")
        return cls(
            vocab_size=config.size("vocab_size"),
            hidden_size=hidden,
            layers=config.size("num_hidden_layers"),
            heads=heads,
            intermediate_size=config.size("intermediate_size"),
            positions=positions,
            first_position=first,
            token_types=config.size("type_vocab_size"),
            norm_eps=config.positive("layer_norm_eps"),
            activation=_activation(config),
        )


_ROPE_NUMBERS = {
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
}


@dataclass(frozen=True)
class Rope:
    """Rotary positions. `kind` is one of default, linear, dynamic, yarn and llama3; `scaling` holds its numbers.

    `sections`: how many of the head_dim / 2 frequencies follow each axis of a position; one axis for plain text.
    """

    theta: float
    head_dim: int
    positions: int  # the length the model was made for
    kind: str = "default"
    scaling: Mapping[str, float] = field(default_factory=dict)
    sections: tuple[int, ...] = ()

    @classmethod
    def read(cls, config: JsonFile, head_dim: int) -> "Rope":
        """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        rope = config.nested("rope_scaling" if config.has("rope_scaling") else "rope_parameters")
        theta = (rope if rope.has("rope_theta") else config).positive("rope_theta")
        key = "rope_type" if rope.has("rope_type") else "type"
        kind = rope.get(key, str, "default")
        needed = {
            "default": (),
            "mrope": (),  # Qwen2-VL's word for the sections below
            "linear": ("factor",),
            "dynamic": ("factor",),
            "yarn": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        if kind not in needed:
            raise rope.refuse(key, f"none of {', '.join(needed)}")
        if (rope if rope.has("partial_rotary_factor") else config).get("partial_rotary_factor", float, 1.0) != 1.0:
            raise ConfigError(f"{rope.path}: partial_rotary_factor is not 1, which is not implemented")
        for key in needed[kind]:
            rope.positive(key)
        for key in set(rope.values) & _ROPE_NUMBERS:
            rope.positive(key, 1.0)
        rope.get("truncate", bool, True)
        if kind == "dynamic" and rope.positive("factor") < 1:
            raise rope.refuse("factor", "below 1")
        sections = tuple(rope.get("mrope_section", list, [head_dim // 2]))
        if any(type(n) is not int or n < 1 for n in sections) or sum(sections) != head_dim // 2:
            raise rope.refuse("mrope_section", f"which are not {head_dim // 2} frequencies in all")
        numbers = {key: float(value) for key, value in rope.values.items() if isinstance(value, int | float)}
        return cls(
            theta=theta,
            head_dim=head_dim,
            positions=config.size("max_position_embeddings"),
            kind="default" if kind == "mrope" else kind,
            scaling=numbers,
            sections=sections,
        )


@dataclass(frozen=True)
class DecoderShape:
    """Llama, Mistral, Qwen2, Qwen3: pre-norm, RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    causal: bool
    windows: tuple[int | None, ...]  # by layer: how many keys a query sees, itself included; None: all
    rope: Rope
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool

    @property
    def max_tokens(self) -> int:
        """Dynamic scaling is there to go beyond the length the model was made for, by its factor."""
        grown = self.rope.scaling["factor"] if self.rope.kind == "dynamic" else 1
        return int(self.rope.positions * grown)

    @classmethod
    def read(cls, config: JsonFile, *, causal: bool | None, qk_norm: bool, qkv_bias: bool) -> "DecoderShape":
        """`causal` None: config.json's is_causal decides, and must be there."""
        stated = config.need("is_causal", bool) if causal is None else config.get("is_causal", bool, causal)
        if causal is not None and stated != causal:
            raise config.refuse("is_causal", f"the family says {causal}")
        if _activation(config) != "silu":
            raise config.refuse("hidden_act", "only 'silu' is implemented in a decoder")
        heads, kv_heads = config.size("num_attention_heads"), config.size("num_key_value_heads")
        if heads % kv_heads:
            raise config.refuse("num_attention_heads", f"not a multiple of num_key_value_heads {kv_heads}")
        # Only Qwen3, the one with norms inside its heads, has a head_dim of its own by default.
        stated_head = qk_norm or config.has("head_dim")
        head_dim = config.size("head_dim") if stated_head else config.size("hidden_size") // heads
        if head_dim % 2:
            raise ConfigError(f"{config.path}: a head_dim of {head_dim} is odd, rotary positions need pairs")
        layers = config.size("num_hidden_layers")
        windows = _windows(config, layers)
        if not stated and any(windows):
            raise config.refuse("sliding_window", "which is implemented for causal attention only")
        bias = config.get("attention_bias", bool, False)
        return cls(
            vocab_size=config.size("vocab_size"),
            hidden_size=config.size("hidden_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=config.size("intermediate_size"),
            norm_eps=config.positive("rms_norm_eps"),
            causal=stated,
            windows=windows,
            rope=Rope.read(config, head_dim),
            qk_norm=qk_norm,
            qkv_bias=qkv_bias or bias,
            output_bias=bias,
            mlp_bias=config.get("mlp_bias", bool, False),
        )


@dataclass(frozen=True)
class TowerShape:
    """A stack of pre-norm blocks: CLIP's text and vision towers, Qwen2-VL's vision tower."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    norm_eps: float
    activation: str


@dataclass(frozen=True)
class ClipShape:
    """CLIP: a causal text tower and a vision tower, each projected to `hidden_size`."""

    text: TowerShape
    vision: TowerShape
    hidden_size: int
    vocab_size: int
    max_tokens: int
    end_of_text: int | None  # the id whose first place is pooled; None: the first place of the highest id
    image_size: int  # pixels a side
    patch_size: int

    @property
    def vision_tokens(self) -> int:
        """Tokens of a picture: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @classmethod
    def read(cls, config: JsonFile) -> "ClipShape":
        # transformers lets these older keys, where they are not null, replace the newer ones whole.
        text, vision = (
            config.nested(f"{key}_dict" if config.has(f"{key}_dict") else key)
            for key in ("text_config", "vision_config")
        )
        if vision.get("num_channels", int, 3) != 3:
            raise vision.refuse("num_channels", "only 3 is implemented")
        # Configs before transformers 4.31 say 2, which no tokenizer agrees with.
        eos = text.get("eos_token_id", int, 49_407)
        return cls(
            text=_tower(text, hidden=512, intermediate=2_048, heads=8),
            vision=_tower(vision, hidden=768, intermediate=3_072, heads=12),
            hidden_size=config.size("projection_dim"),
            vocab_size=text.size("vocab_size", 49_408),
            max_tokens=text.size("max_position_embeddings", 77),
            end_of_text=None if eos == 2 else eos,
            image_size=vision.size("image_size", 224),
            patch_size=vision.size("patch_size", 32),
        )


@dataclass(frozen=True)
class Qwen2VLShape:
    """Qwen2-VL: a vision tower over patches, merged `merge` x `merge` into tokens of the text decoder."""

    text: DecoderShape
    vision: TowerShape
    patch_size: int
    merge: int
    frames: int
    image_token: int

    @property
    def hidden_size(self) -> int:
        return self.text.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def max_tokens(self) -> int:
        return self.text.max_tokens

    @classmethod
    def read(cls, config: JsonFile) -> "Qwen2VLShape":
        text = config.nested("text_config") if config.has("text_config") else config
        vision = config.nested("vision_config")
        width, heads = vision.size("embed_dim", 1_280), vision.size("num_heads", 16)
        if width % heads or width // heads % 4:
            raise vision.refuse("embed_dim", f"which {heads} heads do not share in multiples of 4")
        if (theta := vision.nested("rope_parameters").positive("rope_theta", 1e4)) != 1e4:
            raise ConfigError(f"{vision.path}: rope_theta is {theta:g}, only 10000 is implemented")
        decoder = DecoderShape.read(text, causal=True, qk_norm=False, qkv_bias=True)
        if len(decoder.rope.sections) != 3:
            raise ConfigError(f"{text.path}: mrope_section is missing")
        return cls(
            text=decoder,
            vision=TowerShape(
                hidden_size=width,
                layers=vision.size("depth", 32),
                heads=heads,
                intermediate_size=int(width * vision.positive("mlp_ratio", 4.0)),
                norm_eps=1e-6,  # fixed in Qwen2-VL's code
                activation=_activation(vision, "quick_gelu"),
            ),
            patch_size=vision.size("patch_size", 14),
            merge=vision.size("spatial_merge_size", 2),
            frames=vision.size("temporal_patch_size", 2),
            image_token=config.size("image_token_id"),
        )


Shape = EncoderShape | DecoderShape | ClipShape | Qwen2VLShape


def _activation(config: JsonFile, default: str | None = None) -> str:
    name = config.need("hidden_act", str) if default is None else config.get("hidden_act", str, default)
    if name not in _ACTIVATIONS:
        raise config.refuse("hidden_act", f"not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _heads(config: JsonFile, hidden: int | None = None, heads: int | None = None) -> tuple[int, int]:
    """(hidden_size, num_attention_heads), which must divide."""
    width, count = config.size("hidden_size", hidden), config.size("num_attention_heads", heads)
    if width % count:
        raise ConfigError(f"{config.path}: hidden_size {width} is not a multiple of num_attention_heads {count}")
    return width, count


def _tower(config: JsonFile, hidden: int, intermediate: int, heads: int) -> TowerShape:
    """One of CLIP's towers, with its config class's own defaults."""
    hidden, heads = _heads(config, hidden, heads)
    return TowerShape(
        hidden_size=hidden,
        layers=config.size("num_hidden_layers", 12),
        heads=heads,
        intermediate_size=config.size("intermediate_size", intermediate),
        norm_eps=config.positive("layer_norm_eps", 1e-5),
        activation=_activation(config, "quick_gelu"),
    )


def _windows(config: JsonFile, layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window, by transformers' rules: Mistral's holds everywhere, Qwen's has to be switched on
    and then holds in the `layer_types` named sliding_attention, or from layer `max_window_layers` on."""
    model_type = config.values.get("model_type")
    # Written as null there is none; left out it is 4,096, by the config classes of all three.
    stated = config.has("sliding_window") or "sliding_window" not in config.values
    window = config.size("sliding_window", 4_096) if stated and model_type != "llama" else None
    if model_type == "mistral" or window is None:
        return (window,) * layers
    if not config.get("use_sliding_window", bool, False):
        return (None,) * layers
    if config.has("layer_types"):
        types = config.get("layer_types", list, [])
        if len(types) != layers or any(kind not in ("full_attention", "sliding_attention") for kind in types):
            raise config.refuse("layer_types", f"not one of full_attention and sliding_attention for {layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = config.need("max_window_layers", int)
    return tuple(window if layer >= first else None for layer in range(layers))
