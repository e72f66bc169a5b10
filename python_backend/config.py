"""The place for the engine's defaults: what the operator decides (ServingConfig) and what the checkpoint states
(ModelConfig)."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from triton_embed.python_backend.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ServingConfig:
    """What the operator decides: `config.pbtxt` parameters of a family, each with its default here."""

    name: str
    checkpoint: str  # Hugging Face id, or an absolute directory
    checkpoint_root: Path  # where ids are looked up: <root>/<org>/<name>
    model_types: tuple[str, ...] = ()  # the model_type of config.json that this family serves
    device: str = "cpu"
    checkpoint_package: str = ""  # an installed Python package whose `model/` carries the checkpoint
    aliases: tuple[str, ...] = ()  # further names the gateway answers to
    dtype: str = "auto"  # auto: fp32 on a CPU, bf16 on a GPU
    pooling: str = ""  # must agree with the checkpoint's 1_Pooling, or stand in for it
    max_tokens: int = 0  # 0: what the checkpoint allows; otherwise a lower limit
    max_batch_tokens: int = 0  # tokens of one forward pass; 0: 1,024 on a CPU, 16,384 on a GPU
    max_request_tokens: int = 300_000
    matryoshka_dimensions: tuple[int, ...] = ()
    is_matryoshka: bool = False
    threads: int = 0  # 0: every core this process may use

    @property
    def batch_tokens(self) -> int:
        """The token budget of one forward pass."""
        return self.max_batch_tokens or (1_024 if self.device == "cpu" else 16_384)

    @property
    def thread_count(self) -> int:
        """Threads for the forward pass on a CPU."""
        return self.threads or len(os.sched_getaffinity(0))

    @classmethod
    def from_triton(cls, args: Mapping[str, str]) -> "ServingConfig":
        """From the arguments of Triton's `initialize`. ConfigError: an unknown key or a value of the wrong kind."""
        config = json.loads(args["model_config"])
        directory = Path(args["model_repository"])
        root = os.environ.get("TRITON_EMBED_CHECKPOINTS") or directory.parent.parent / "checkpoints"
        gpu = args.get("model_instance_kind") == "GPU"
        stated = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        settable = {f.name: f.type for f in fields(cls) if f.name not in {"name", "checkpoint_root", "device"}}
        values: dict[str, Any] = {}
        for key, text in stated.items():
            if key not in settable:
                raise ConfigError(
                    f"{config['name']}/config.pbtxt: unknown parameter '{key}'; known are {', '.join(settable)}"
                )
            values[key] = _parse(f"{config['name']}/config.pbtxt: {key}", text, settable[key])
        if values.get("dtype", "auto") not in DTYPES:
            raise ConfigError(
                f"{config['name']}/config.pbtxt: dtype is '{values['dtype']}', not one of {', '.join(DTYPES)}"
            )
        if "checkpoint" not in values:
            raise ConfigError(f"{config['name']}/config.pbtxt: parameter 'checkpoint' is missing")
        return cls(
            name=config["name"],
            checkpoint_root=Path(root).absolute(),
            device=f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
            **values,
        )


def _parse(where: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.strip().lower()]
        if kind is int:
            return _natural(text)
        items = [item.strip() for item in text.split(",") if item.strip()]
        if kind == tuple[int, ...]:
            return tuple(sorted(_natural(item) for item in items))
        return tuple(items) if kind == tuple[str, ...] else text
    except (KeyError, ValueError):
        raise ConfigError(f"{where} is '{text}', which is not {_KINDS[kind]}") from None


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


_KINDS = {
    bool: "true or false",
    int: "a whole number, 0 or more",
    tuple[int, ...]: "a comma-separated list of whole numbers",
}

# config.json's names for activations -> kernels.ops names
_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
# 1_Pooling/config.json's switches -> our names; sentence-transformers' other modes are refused by name
_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True)
class ModelConfig:
    """What the checkpoint's own files state. Sizes in elements, lengths in tokens."""

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    positions: int
    token_types: int
    norm_eps: float
    activation: str
    pooling: str
    max_tokens: int
    lowercase: bool = False
    matryoshka: Literal[True] | tuple[int, ...] | None = None  # True: any size; None: the model was not trained for it
    prompts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_checkpoint(cls, directory: Path, serving: ServingConfig) -> "ModelConfig":
        """Read config.json and sentence-transformers' files beside it. ConfigError: file, key and both values."""
        config = JsonFile(directory / "config.json", required=True)
        model_type = config.need("model_type", str)
        if model_type not in serving.model_types:
            raise config.refuse(
                "model_type", f"{serving.name}/config.pbtxt serves {', '.join(serving.model_types) or 'none'}"
            )
        if config.get("position_embedding_type", str, "absolute") != "absolute":
            raise config.refuse("position_embedding_type", "only 'absolute' is implemented")
        activation = config.need("hidden_act", str)
        if activation not in _ACTIVATIONS:
            raise config.refuse("hidden_act", f"not one of {', '.join(_ACTIVATIONS)}")
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        if hidden % heads:
            raise ConfigError(f"{config.path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        if (eps := config.need("layer_norm_eps", float)) <= 0:
            raise config.refuse("layer_norm_eps", "not above 0")
        sentence = JsonFile(directory / "sentence_bert_config.json")
        positions = config.size("max_position_embeddings")
        limits = [positions, sentence.size("max_seq_length") if sentence.has("max_seq_length") else 0]
        prompts = JsonFile(directory / "config_sentence_transformers.json")
        return cls(
            model_type=model_type,
            vocab_size=config.size("vocab_size"),
            hidden_size=hidden,
            layers=config.size("num_hidden_layers"),
            heads=heads,
            intermediate_size=config.size("intermediate_size"),
            positions=positions,
            token_types=config.size("type_vocab_size"),
            norm_eps=eps,
            activation=_ACTIVATIONS[activation],
            pooling=_pooling(directory, serving),
            max_tokens=min(limit for limit in (*limits, serving.max_tokens) if limit),
            lowercase=sentence.get("do_lower_case", bool, False),
            matryoshka=_matryoshka(config, hidden, serving),
            prompts=prompts.get("prompts", dict, {}),
        )


def _pooling(directory: Path, serving: ServingConfig) -> str:
    """The pooling mode, from 1_Pooling or the operator; there is no default, for a guess gives wrong vectors."""
    modules = directory / "modules.json"
    for module in read_json(modules, list):
        name = module.get("type") if isinstance(module, dict) else module
        if str(name).rsplit(".", 1)[-1] not in {"Transformer", "Pooling", "Normalize"} or not isinstance(module, dict):
            raise ConfigError(f"{modules}: module {name!r} is not implemented")
    file = JsonFile(directory / "1_Pooling" / "config.json")
    if not file.get("include_prompt", bool, True):
        raise file.refuse("include_prompt", "only true is implemented")
    if file.has("pooling_mode"):  # the form sentence-transformers 5 and later write
        mode = file.get("pooling_mode", (str, list), "")
        chosen = [_POOLING.get(f"pooling_mode_{name}", name) for name in ([mode] if isinstance(mode, str) else mode)]
    else:
        switches = [key for key, on in file.values.items() if key.startswith("pooling_mode_") and on is True]
        chosen = [_POOLING.get(key, key) for key in switches]
    if not chosen and not serving.pooling:
        raise ConfigError(f"{file.path} is missing: state pooling (cls, mean or last) in {serving.name}/config.pbtxt")
    stated = "+".join(map(str, chosen))
    pooling = serving.pooling or stated
    if chosen and stated != pooling:
        raise ConfigError(f"{file.path} says pooling '{stated}', {serving.name}/config.pbtxt says '{pooling}'")
    if pooling not in _POOLING.values():
        raise ConfigError(f"{file.path}: pooling '{pooling}' is not implemented; cls, mean and last are")
    return pooling


def _matryoshka(config: "JsonFile", hidden: int, serving: ServingConfig) -> Literal[True] | tuple[int, ...] | None:
    """Which output sizes the model was trained for; the operator's word wins over the checkpoint's."""
    if serving.is_matryoshka or serving.matryoshka_dimensions:
        sizes, where = serving.matryoshka_dimensions, f"{serving.name}/config.pbtxt"
    else:
        sizes, where = tuple(config.get("matryoshka_dimensions", list, [])), str(config.path)
        if not sizes and not config.get("is_matryoshka", bool, False):
            return None
    if any(type(size) is not int or not 1 <= size <= hidden for size in sizes):
        raise ConfigError(f"{where}: matryoshka_dimensions {list(sizes)} are not all sizes up to hidden_size {hidden}")
    return sizes or True


class JsonFile:
    """A JSON object of a checkpoint, read key by key; empty where there is no file and none is required.

    ConfigError, naming file, key and value: no file, no JSON object, a missing key or a value of another kind.
    """

    def __init__(self, path: Path, required: bool = False) -> None:
        if required and not path.is_file():
            raise ConfigError(f"{path} is missing")
        self.path = path
        self.values: dict[str, Any] = read_json(path, dict)

    def has(self, key: str) -> bool:
        """Whether the key is there with a value; null is none."""
        return self.values.get(key) is not None

    def get(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """The value, of this kind, or the default where there is none."""
        if not self.has(key):
            return default
        value = self.values[key]
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise self.refuse(key, f"not of type {' or '.join(k.__name__ for k in kinds)}")
        return value

    def need(self, key: str, kind: type) -> Any:
        """The value, which must be there."""
        if not self.has(key):
            raise ConfigError(f"{self.path}: '{key}' is missing")
        return self.get(key, kind, None)

    def size(self, key: str) -> int:
        """A whole number above 0, which must be there."""
        value: int = self.need(key, int)
        if value < 1:
            raise self.refuse(key, "not above 0")
        return value

    def refuse(self, key: str, why: str) -> ConfigError:
        """The error that names this file, the key and its value."""
        return ConfigError(f"{self.path}: {key} is {self.values.get(key)!r}, {why}")


def read_json(path: Path, kind: type) -> Any:
    """A JSON file that holds a dict or a list, as `kind` says; an empty one where there is no file.

    ConfigError: it is not JSON, or holds something else.
    """
    if not path.is_file():
        return kind()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, kind):
        raise ConfigError(f"{path} does not hold a JSON {'object' if kind is dict else 'list'}")
    return found
