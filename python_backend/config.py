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
        config = read_json(directory / "config.json", required=True)
        file = f"{directory / 'config.json'}"
        model_type = config.get("model_type")
        if model_type not in serving.model_types:
            raise ConfigError(
                f"{file}: model_type is '{model_type}', {serving.name}/config.pbtxt serves "
                f"{', '.join(serving.model_types) or 'none'}"
            )

        def need(key: str) -> Any:
            if key not in config:
                raise ConfigError(f"{file}: '{key}' is missing")
            return config[key]

        def size(key: str) -> int:
            if type(value := need(key)) is not int or value < 1:
                raise ConfigError(f"{file}: {key} is {value!r}, not a whole number above 0")
            return value

        if (kind := config.get("position_embedding_type", "absolute")) != "absolute":
            raise ConfigError(f"{file}: position_embedding_type is '{kind}', only 'absolute' is implemented")
        if (name := need("hidden_act")) not in _ACTIVATIONS:
            raise ConfigError(f"{file}: hidden_act is '{name}', not one of {', '.join(_ACTIVATIONS)}")
        if size("hidden_size") % size("num_attention_heads"):
            raise ConfigError(
                f"{file}: hidden_size {config['hidden_size']} is not a multiple of num_attention_heads "
                f"{config['num_attention_heads']}"
            )
        sentence = read_json(directory / "sentence_bert_config.json")
        positions = size("max_position_embeddings")
        limits = [positions, sentence.get("max_seq_length"), serving.max_tokens]
        return cls(
            model_type=model_type,
            vocab_size=size("vocab_size"),
            hidden_size=config["hidden_size"],
            layers=size("num_hidden_layers"),
            heads=config["num_attention_heads"],
            intermediate_size=size("intermediate_size"),
            positions=positions,
            token_types=size("type_vocab_size"),
            norm_eps=need("layer_norm_eps"),
            activation=_ACTIVATIONS[name],
            pooling=_pooling(directory, serving),
            max_tokens=min(limit for limit in limits if limit),
            lowercase=bool(sentence.get("do_lower_case")),
            matryoshka=_matryoshka(config, config["hidden_size"], file, serving),
            prompts=read_json(directory / "config_sentence_transformers.json").get("prompts") or {},
        )


def _pooling(directory: Path, serving: ServingConfig) -> str:
    """The pooling mode, from 1_Pooling or the operator; there is no default, for a guess gives wrong vectors."""
    for module in read_json(directory / "modules.json", kind=list):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind not in {"Transformer", "Pooling", "Normalize"}:
            raise ConfigError(f"{directory / 'modules.json'}: module '{module['type']}' is not implemented")
    file = directory / "1_Pooling" / "config.json"
    stated = read_json(file)
    if "pooling_mode" in stated:  # the form sentence-transformers 5 and later write
        mode = stated["pooling_mode"]
        chosen = [mode] if isinstance(mode, str) else list(mode)
        chosen = [{"lasttoken": "last"}.get(name, name) for name in chosen]
    else:
        chosen = [
            _POOLING.get(key, key) for key, value in stated.items() if key.startswith("pooling_mode_") and value is True
        ]
    if stated.get("include_prompt") is False:
        raise ConfigError(f"{file}: include_prompt false is not implemented")
    if not chosen and not serving.pooling:
        raise ConfigError(f"{file} is missing: state pooling (cls, mean or last) in {serving.name}/config.pbtxt")
    pooling = serving.pooling or (chosen[0] if len(chosen) == 1 else "+".join(chosen))
    if chosen and chosen != [pooling]:
        raise ConfigError(f"{file} says pooling '{'+'.join(chosen)}', {serving.name}/config.pbtxt says '{pooling}'")
    if pooling not in _POOLING.values():
        raise ConfigError(f"{file}: pooling '{pooling}' is not implemented; cls, mean and last are")
    return pooling


def _matryoshka(
    config: Mapping[str, Any], hidden: int, file: str, serving: ServingConfig
) -> Literal[True] | tuple[int, ...] | None:
    """Which output sizes the model was trained for; the operator's word wins over the checkpoint's."""
    if serving.is_matryoshka or serving.matryoshka_dimensions:
        sizes, where = serving.matryoshka_dimensions, f"{serving.name}/config.pbtxt"
    else:
        sizes, where = tuple(config.get("matryoshka_dimensions") or ()), file
        if not sizes and not config.get("is_matryoshka"):
            return None
    if any(not 1 <= size <= hidden for size in sizes):
        raise ConfigError(f"{where}: matryoshka_dimensions {list(sizes)} go beyond hidden_size {hidden}")
    return sizes or True


def read_json(path: Path, required: bool = False, kind: type = dict) -> Any:
    """A JSON file of the checkpoint; an empty one of its kind where there is none.

    ConfigError: it is missing and required, unreadable, or not a JSON object (`kind` dict) or list.
    """
    if not path.is_file():
        if required:
            raise ConfigError(f"{path} is missing")
        return kind()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, kind):
        raise ConfigError(f"{path} does not hold a JSON {'object' if kind is dict else 'list'}")
    return found
