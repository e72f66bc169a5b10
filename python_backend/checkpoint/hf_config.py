"""Network configurations, read from config.json: the only module that knows transformers' names for sizes.

Sizes are in elements, lengths in tokens. Every `read` raises a MissingKeyError for a key that is missing, whose default
`class_defaults` knows, and a ConfigError for a value that this engine does not implement.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from triton_embed.python_backend.checkpoint.json_file import JsonFile
from triton_embed.python_backend.errors import ConfigError

# Activation names of config.json -> names in kernels.ops
_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu_erf",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class EncoderConfig:
    """The configuration of BERT and XLM-RoBERTa: learned positions, post-norm."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    positions: int  # rows of the position embedding table
    first_position: int  # index of the first token's row: RoBERTa counts from padding_idx + 1
    token_types: int
    norm_eps: float
    activation: str

    @property
    def max_tokens(self) -> int:
        return self.positions - self.first_position

    @classmethod
    def read(cls, config: JsonFile) -> "EncoderConfig":
        if config.get("position_embedding_type", str, "absolute") != "absolute":
            raise config.error("position_embedding_type", "only 'absolute' is implemented")
        for key in ("is_decoder", "is_causal"):
            if config.get(key, bool, False):
                raise config.error(key, "only false is implemented: an encoder's attention is bidirectional")
        roberta = config.require("model_type", str) in ("roberta", "xlm-roberta")
        hidden, heads = _hidden_size_and_heads(config)
        positions, first = (
            config.positive_int("max_position_embeddings"),
            config.require("pad_token_id", int) + 1 if roberta else 0,
        )
        if not 0 <= first < positions:
            raise config.error(
                "pad_token_id", f"must be from 0 to {positions - 2}, because max_position_embeddings is {positions}"
            )
        return cls(
            vocab_size=config.positive_int("vocab_size"),
            hidden_size=hidden,
            layers=config.positive_int("num_hidden_layers"),
            heads=heads,
            intermediate_size=config.positive_int("intermediate_size"),
            positions=positions,
            first_position=first,
            token_types=config.positive_int("type_vocab_size"),
            norm_eps=config.positive_float("layer_norm_eps"),
            activation=_activation(config),
        )


_TRAINED_LENGTH = "original_max_position_embeddings"
_ROPE_NUMBER_KEYS = {
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    _TRAINED_LENGTH,
}


@dataclass(frozen=True)
class RopeConfig:
    """The configuration of rotary positions.

    Attributes:
        kind: One of default, linear, dynamic, yarn and llama3.
        scaling: The numbers that belong to `kind`.
        sections: How many of the head_dim / 2 frequencies use each axis of a position; one axis for plain text.
    """

    theta: float
    head_dim: int
    positions: int  # trained length in tokens: max_position_embeddings
    kind: str = "default"
    scaling: Mapping[str, float] = field(default_factory=dict)
    sections: tuple[int, ...] = ()

    @classmethod
    def read(cls, config: JsonFile, head_dim: int) -> "RopeConfig":
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (earlier versions)."""
        rope = config.nested("rope_scaling" if config.has("rope_scaling") else "rope_parameters")
        theta = (rope if rope.has("rope_theta") else config).positive_float("rope_theta")
        key = "rope_type" if rope.has("rope_type") else "type"
        kind = rope.get(key, str, "default")
        required_keys = {
            "default": (),
            "mrope": (),  # Qwen2-VL's name for `default` with the sections below
            "linear": ("factor",),
            "dynamic": ("factor",),
            "yarn": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", _TRAINED_LENGTH),
        }
        if kind not in required_keys:
            raise rope.error(key, f"must be one of {', '.join(required_keys)}")
        if (rope if rope.has("partial_rotary_factor") else config).get("partial_rotary_factor", float, 1.0) != 1.0:
            raise ConfigError(f"{rope.path}: only a partial_rotary_factor of 1 is implemented")
        for key in required_keys[kind]:
            rope.positive_float(key)
        if config.has(_TRAINED_LENGTH):  # which transformers prefers
            rope.values = {**rope.values, _TRAINED_LENGTH: config.values[_TRAINED_LENGTH]}
        for key in set(rope.values) & _ROPE_NUMBER_KEYS:
            rope.positive_float(key, 1.0)
        rope.get("truncate", bool, True)
        if kind == "dynamic" and rope.positive_float("factor") < 1:
            raise rope.error("factor", "must be at least 1")
        sections = tuple(rope.get("mrope_section", list, [head_dim // 2]))
        if any(type(n) is not int or n < 1 for n in sections) or sum(sections) != head_dim // 2:
            raise rope.error("mrope_section", f"must be whole numbers above 0 that add up to {head_dim // 2}")
        numbers = {key: float(value) for key, value in rope.values.items() if isinstance(value, int | float)}
        return cls(
            theta=theta,
            head_dim=head_dim,
            positions=config.positive_int("max_position_embeddings"),
            kind="default" if kind == "mrope" else kind,
            scaling=numbers,
            sections=sections,
        )


@dataclass(frozen=True)
class DecoderConfig:
    """The configuration of Llama, Mistral, Qwen2 and Qwen3.

    These are pre-norm networks with RMSNorm, rotary positions, grouped-query attention and SwiGLU.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    causal: bool
    windows: tuple[int | None, ...]  # per layer: number of keys a query attends to, itself included; None: all
    rope: RopeConfig
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool

    @property
    def max_tokens(self) -> int:
        """The maximum length: dynamic scaling extends the trained length by its factor."""
        factor = self.rope.scaling["factor"] if self.rope.kind == "dynamic" else 1
        return int(self.rope.positions * factor)

    @classmethod
    def read(cls, config: JsonFile, *, causal: bool | None, qk_norm: bool, qkv_bias: bool) -> "DecoderConfig":
        """Read the configuration of a decoder.

        Args:
            causal: Whether the family's attention is causal; None: is_causal of config.json decides and is required.
            qk_norm: Whether each query and key head has an RMSNorm.
            qkv_bias: Whether the query, key and value projections always have a bias.
        """
        is_causal = config.require("is_causal", bool) if causal is None else config.get("is_causal", bool, causal)
        if causal is not None and is_causal != causal:
            raise config.error("is_causal", f"the family requires {causal}")
        if _activation(config) != "silu":
            raise config.error("hidden_act", "only 'silu' is implemented in a decoder")
        heads, kv_heads = config.positive_int("num_attention_heads"), config.positive_int("num_key_value_heads")
        if heads % kv_heads:
            raise config.error("num_attention_heads", f"must be a multiple of num_key_value_heads {kv_heads}")
        # head_dim defaults to hidden_size / heads, except in Qwen3 (the architecture with qk_norm).
        has_head_dim = qk_norm or config.has("head_dim")
        head_dim = config.positive_int("head_dim") if has_head_dim else config.positive_int("hidden_size") // heads
        if head_dim % 2:
            raise ConfigError(f"{config.path}: a head_dim of {head_dim} is odd; rotary positions need an even number")
        layers = config.positive_int("num_hidden_layers")
        windows = _windows(config, layers)
        if not is_causal and any(windows):
            raise config.error("sliding_window", "a sliding window is implemented for causal attention only")
        model_type = config.values.get("model_type")
        # The other two classes do not read these keys.
        bias = model_type in ("llama", "qwen3") and config.get("attention_bias", bool, False)
        return cls(
            vocab_size=config.positive_int("vocab_size"),
            hidden_size=config.positive_int("hidden_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=config.positive_int("intermediate_size"),
            norm_eps=config.positive_float("rms_norm_eps"),
            causal=is_causal,
            windows=windows,
            rope=RopeConfig.read(config, head_dim),
            qk_norm=qk_norm,
            qkv_bias=qkv_bias or bias,
            output_bias=bias,
            mlp_bias=model_type == "llama" and config.get("mlp_bias", bool, False),
        )


@dataclass(frozen=True)
class TowerConfig:
    """The configuration of a stack of pre-norm blocks: CLIP's text and vision towers, Qwen2-VL's vision tower."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    norm_eps: float
    activation: str


@dataclass(frozen=True)
class ClipConfig:
    """The configuration of CLIP: a causal text tower and a vision tower, each projected to `hidden_size`."""

    text: TowerConfig
    vision: TowerConfig
    hidden_size: int
    vocab_size: int
    max_tokens: int
    # Pooling takes the first token with this id; None: the first token with the highest id in the text.
    end_of_text: int | None
    image_size: int  # pixels per side
    patch_size: int

    @property
    def vision_tokens(self) -> int:
        """The number of tokens of an image: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @classmethod
    def read(cls, config: JsonFile) -> "ClipConfig":
        # If the older key is not null, transformers uses it instead of the newer one and does not merge them.
        text, vision = (
            config.nested(f"{key}_dict" if config.has(f"{key}_dict") else key)
            for key in ("text_config", "vision_config")
        )
        if not text.get("is_causal", bool, True):
            raise text.error("is_causal", "only true is implemented")
        if vision.get("num_channels", int, 3) != 3:
            raise vision.error("num_channels", "only 3 is implemented")
        # Configs written before transformers 4.31 contain 2, which is wrong for every CLIP tokenizer.
        eos = text.require("eos_token_id", int)
        return cls(
            text=_tower(text),
            vision=_tower(vision),
            hidden_size=config.positive_int("projection_dim"),
            vocab_size=text.positive_int("vocab_size"),
            max_tokens=text.positive_int("max_position_embeddings"),
            end_of_text=None if eos == 2 else eos,
            image_size=vision.positive_int("image_size"),
            patch_size=vision.positive_int("patch_size"),
        )


@dataclass(frozen=True)
class Qwen2VLConfig:
    """The configuration of Qwen2-VL: a text decoder and a vision tower.

    Each block of `merge` x `merge` patches of the vision tower becomes one token of the decoder.
    """

    text: DecoderConfig
    vision: TowerConfig
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
    def read(cls, config: JsonFile) -> "Qwen2VLConfig":
        if not config.get("is_causal", bool, True):
            raise config.error("is_causal", "the family requires True")
        text = config.nested("text_config") if config.has("text_config") else config
        vision = config.nested("vision_config")
        hidden_size, heads = vision.positive_int("embed_dim"), vision.positive_int("num_heads")
        if hidden_size % heads or hidden_size // heads % 4:
            raise vision.error("embed_dim", f"each of the {heads} heads must get a multiple of 4")
        if (theta := vision.nested("rope_parameters").positive_float("rope_theta", 1e4)) != 1e4:
            raise ConfigError(f"{vision.path}: rope_theta is {theta:g}; only 10000 is implemented")
        decoder = DecoderConfig.read(text, causal=True, qk_norm=False, qkv_bias=True)
        if len(decoder.rope.sections) != 3:
            raise ConfigError(f"{text.path}: mrope_section is missing")
        return cls(
            text=decoder,
            vision=TowerConfig(
                hidden_size=hidden_size,
                layers=vision.positive_int("depth"),
                heads=heads,
                intermediate_size=int(hidden_size * vision.positive_float("mlp_ratio")),
                norm_eps=1e-6,  # constant in transformers' Qwen2-VL code
                activation=_activation(vision),
            ),
            patch_size=vision.positive_int("patch_size"),
            merge=vision.positive_int("spatial_merge_size"),
            frames=vision.positive_int("temporal_patch_size"),
            image_token=config.positive_int("image_token_id"),
        )


NetworkConfig = EncoderConfig | DecoderConfig | ClipConfig | Qwen2VLConfig


def _activation(config: JsonFile) -> str:
    name = config.require("hidden_act", str)
    if name not in _ACTIVATIONS:
        raise config.error("hidden_act", f"must be one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _hidden_size_and_heads(config: JsonFile) -> tuple[int, int]:
    """Return (hidden_size, num_attention_heads) and check that the heads divide the hidden size."""
    hidden_size, heads = config.positive_int("hidden_size"), config.positive_int("num_attention_heads")
    if hidden_size % heads:
        raise ConfigError(f"{config.path}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
    return hidden_size, heads


def _tower(config: JsonFile) -> TowerConfig:
    """Read one of CLIP's towers."""
    hidden, heads = _hidden_size_and_heads(config)
    return TowerConfig(
        hidden_size=hidden,
        layers=config.positive_int("num_hidden_layers"),
        heads=heads,
        intermediate_size=config.positive_int("intermediate_size"),
        norm_eps=config.positive_float("layer_norm_eps"),
        activation=_activation(config),
    )


def _windows(config: JsonFile, layers: int) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, by the rules of transformers.

    A Mistral window applies to every layer, or to those that `layer_types` calls sliding_attention. A Qwen one applies
    only if `use_sliding_window` is true: to the layers of `layer_types`, or to all layers from `max_window_layers` on.
    Llama has no windows.
    """
    model_type = config.values.get("model_type")
    is_used = model_type == "mistral" or (model_type != "llama" and config.get("use_sliding_window", bool, False))
    # An explicit null means no window.
    if not is_used or ("sliding_window" in config.values and not config.has("sliding_window")):
        return (None,) * layers
    window = config.positive_int("sliding_window")
    if config.has("layer_types"):
        types = config.get("layer_types", list, [])
        if len(types) != layers or any(kind not in ("full_attention", "sliding_attention") for kind in types):
            raise config.error(
                "layer_types", f"must be full_attention or sliding_attention for each of the {layers} layers"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = 0 if model_type == "mistral" else config.require("max_window_layers", int)
    return tuple(window if layer >= first else None for layer in range(layers))
