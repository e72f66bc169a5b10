"""Engine configuration: operator settings (ServingConfig) and checkpoint settings (ModelConfig).

ServingConfig is the only place that defines defaults for the `config.pbtxt` parameters.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from triton_embed.python_backend.checkpoint.class_defaults import read_with_defaults
from triton_embed.python_backend.checkpoint.hf_config import ClipConfig, EncoderConfig, NetworkConfig
from triton_embed.python_backend.checkpoint.json_file import JsonFile, read_json
from triton_embed.python_backend.checkpoint.network_folder import network_directory
from triton_embed.python_backend.checkpoint.sentence_config import max_length, read_sentence_config
from triton_embed.python_backend.cores import core_count
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.inputs.row import Channels
from triton_embed.python_backend.spec import Spec

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
IMAGE_POSITIONS = ("mrope", "sequential")
KERNELS = ("auto", "reference")  # kernels.backend also accepts `triton`, for tests on a CPU
OF_TRITON = {"name", "checkpoint_root", "device", "instances"}  # fields that are not parameters
KERNEL_ALIASES = {"torch": "reference"}  # earlier spelling


@dataclass(frozen=True)
class ServingConfig:
    """Operator settings of one family: the parameters of its `config.pbtxt`, with their defaults."""

    name: str
    checkpoint: str  # Hugging Face id, or an absolute directory
    checkpoint_root: Path  # directory that holds the checkpoints of Hugging Face ids: <root>/<org>/<name>
    model_types: tuple[str, ...] = ()  # values of config.json's model_type that this family serves
    device: str = "cpu"
    checkpoint_package: str = ""  # installed Python package whose `model/` directory contains the checkpoint
    aliases: tuple[str, ...] = ()  # additional model names that the gateway accepts
    # auto: bf16 on a GPU, and on a CPU with bf16 instructions if the vectors stay accurate. int8: CPU only.
    dtype: str = "auto"
    pooling: str = ""  # must agree with the checkpoint's 1_Pooling; required if the checkpoint has none
    max_tokens: int = 0  # lowers the maximum length of an input, in tokens; 0: the checkpoint's limit
    max_batch_tokens: int = 0  # maximum tokens per forward pass; 0: chosen for the device and the network
    max_request_tokens: int = 300_000
    matryoshka_dimensions: tuple[int, ...] = ()
    is_matryoshka: bool = False
    query_instruction: str = ""  # instruction for prompt_name "query" if the checkpoint defines no prompts
    image_positions: str = "mrope"  # position ids of GME image tokens: mrope or sequential
    min_image_tokens: int = 256  # per image, for models that preserve the aspect ratio
    max_image_tokens: int = 1_280
    threads: int = 0  # 0: every core this process may use, or as many as its CPU quota
    kernels: str = "auto"  # auto: Triton on a GPU, compiled loops on a CPU; reference: torch
    cuda_graphs: bool = True  # GPU only: replay small batches as one CUDA graph
    prefix_reuse: bool = True  # causal models only: compute a repeated instruction once
    cache_bytes: int = 0  # size of the cache of vectors for repeated inputs; 0: no cache
    instances: int = 1  # of all `instance_group`s; not a parameter

    @property
    def thread_count(self) -> int:
        """Number of threads for a forward pass on the CPU, whose cores the instances share."""
        return self.threads or max(1, core_count() // self.instances)

    @classmethod
    def from_triton(cls, args: Mapping[str, str]) -> "ServingConfig":
        """Build the settings from the arguments of Triton's `initialize`.

        Environment: `TRITON_EMBED_CHECKPOINTS` overrides the checkpoint root, `TRITON_EMBED_DTYPE` is the dtype of
        models whose config.pbtxt sets none.

        Raises:
            ConfigError: An unknown parameter, or a value of the wrong type.
        """
        config = json.loads(args["model_config"])
        directory = Path(args["model_repository"])
        root = os.environ.get("TRITON_EMBED_CHECKPOINTS") or directory.parent.parent / "checkpoints"
        gpu = args.get("model_instance_kind") == "GPU"
        default_dtype = os.environ.get("TRITON_EMBED_DTYPE")
        parameters = {"dtype": default_dtype} if default_dtype else {}
        parameters |= {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        field_types = {f.name: f.type for f in fields(cls) if f.name not in OF_TRITON}
        values: dict[str, Any] = {}
        for key, text in parameters.items():
            if key not in field_types:
                raise ConfigError(
                    f"{config['name']}/config.pbtxt: unknown parameter '{key}'; "
                    f"known parameters: {', '.join(field_types)}"
                )
            values[key] = _parse(f"{config['name']}/config.pbtxt: {key}", text, field_types[key])
        if "kernels" in values:
            values["kernels"] = KERNEL_ALIASES.get(values["kernels"], values["kernels"])
        for key, choices in (("dtype", DTYPES), ("image_positions", IMAGE_POSITIONS), ("kernels", KERNELS)):
            if values.get(key, choices[0]) not in choices:
                raise ConfigError(
                    f"{config['name']}/config.pbtxt: {key} is '{values[key]}'; must be one of {', '.join(choices)}"
                )
        if "checkpoint" not in values:
            raise ConfigError(f"{config['name']}/config.pbtxt: parameter 'checkpoint' is missing")
        return cls(
            name=config["name"],
            checkpoint_root=Path(root).absolute(),
            device=f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
            instances=_instances(config.get("instance_group", [])),
            **values,
        )


def _instances(groups: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of instances: `count` on each GPU of a group, or on the CPU. Triton fills in the defaults."""
    return sum(group.get("count", 1) * max(1, len(group.get("gpus", ()))) for group in groups) or 1


def _parse(location: str, text: str, field_type: Any) -> Any:
    """Parse a parameter's text as `field_type`; `location` (file and key) begins the error message."""
    try:
        if field_type is bool:
            return {"true": True, "false": False}[text.strip().lower()]
        if field_type is int:
            return _parse_non_negative_int(text)
        items = [item.strip() for item in text.split(",") if item.strip()]
        if field_type == tuple[int, ...]:
            return tuple(sorted(_parse_non_negative_int(item) for item in items))
        return tuple(items) if field_type == tuple[str, ...] else text
    except (KeyError, ValueError):
        raise ConfigError(f"{location} is '{text}'; expected {_TYPE_DESCRIPTIONS[field_type]}") from None


def _parse_non_negative_int(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


_TYPE_DESCRIPTIONS = {
    bool: "true or false",
    int: "a whole number, 0 or more",
    tuple[int, ...]: "a comma-separated list of whole numbers",
}

# Switches of 1_Pooling/config.json -> pooling modes of this engine. Other modes are rejected with their name.
_POOLING_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
MODULE_TYPES = ("Transformer", "Pooling", "Dense", "Normalize")  # of modules.json, in the only supported order
SENTENCE_EMBEDDING = "sentence_embedding"  # sentence-transformers' name of the pooled vector
# Activation of a sentence-transformers Dense module -> its name in kernels.ops
_DENSE_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": None,
    "torch.nn.modules.activation.GELU": "gelu_erf",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Tanh": "tanh",
}


@dataclass(frozen=True)
class Dense:
    """A sentence-transformers Dense module: projects the pooled vector from `in_features` to `out_features`."""

    directory: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str | None


@dataclass(frozen=True)
class ModelConfig:
    """Model settings read from the checkpoint's files. Lengths are in tokens."""

    model_type: str
    network_config: NetworkConfig
    pooling: str
    max_tokens: int
    dense: tuple[Dense, ...] = ()
    lowercase: bool = False
    # Output dimensions of Matryoshka training. True: any number; None: the model was not trained with Matryoshka.
    matryoshka: Literal[True] | tuple[int, ...] | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None  # name of the prompt for requests that select none
    truncate_dim: int | None = None  # dimensions that the checkpoint keeps of each vector; None: all
    image_positions: str = "mrope"
    image_normalization: tuple[Channels, ...] = ()  # per-channel mean and standard deviation of the pixels
    directory: Path = Path()  # of the network, see `network_directory`

    @cached_property
    def vocab_size(self) -> int:
        return self.network_config.vocab_size

    @cached_property
    def dimensions(self) -> int:
        """Dimensions of a vector, unless a request wants fewer."""
        computed = self.dense[-1].out_features if self.dense else self.network_config.hidden_size
        return min(computed, self.truncate_dim or computed)

    @classmethod
    def from_checkpoint(cls, directory: Path, serving: ServingConfig, spec: Spec) -> "ModelConfig":
        """Read config.json and the sentence-transformers files of a checkpoint directory.

        Raises:
            ConfigError: A value is missing, not supported or contradicts config.pbtxt; names file, key and values.
        """
        network = network_directory(directory)
        refuse_adapter(network)
        config = JsonFile(network / "config.json", required=True)
        model_type = config.require("model_type", str)
        if model_type not in serving.model_types:
            raise config.error(
                "model_type", f"{serving.name}/config.pbtxt serves {', '.join(serving.model_types) or 'none'}"
            )
        _refuse_quantized(config)
        network_config = read_with_defaults(spec.read_config, config)
        image_normalization = spec.image_normalization(network)
        sentence_config = read_sentence_config(network, is_text_model=not image_normalization)
        prompts, default_prompt = _prompts(directory)
        saved = JsonFile(directory / "config_sentence_transformers.json")
        model = cls(
            model_type=model_type,
            network_config=network_config,
            pooling=_pooling(directory, serving, spec.pooling),
            max_tokens=_max_tokens(network, network_config, sentence_config, serving),
            dense=_dense(directory, network_config.hidden_size),
            lowercase=sentence_config.get("do_lower_case", bool, False),
            prompts=prompts,
            default_prompt=default_prompt,
            truncate_dim=saved.positive_int("truncate_dim") if saved.has("truncate_dim") else None,
            image_positions=serving.image_positions,
            image_normalization=image_normalization,
            directory=network,
        )
        return replace(model, matryoshka=_matryoshka(config, model.dimensions, serving))


def refuse_adapter(directory: Path) -> None:
    """Refuse an adapter that is not merged into its base model.

    Raises:
        ConfigError: The checkpoint is one, alone or beside the weights of its base model.
    """
    adapter = JsonFile(directory / "adapter_config.json")
    if adapter.values:
        base = adapter.get("base_model_name_or_path", str, "its base model")
        raise ConfigError(
            f"{adapter.path}: this is an adapter for {base}, and adapters are not applied. Merge it once and serve "
            "the result: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(directory)"
        )


def _refuse_quantized(config: JsonFile) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.has(key):
            method = config.nested(key).get("quant_method", str, "unknown")
            raise ConfigError(
                f"{config.path}: {key} has quant_method '{method}'; quantized weights are not implemented: serve the "
                "original checkpoint, with dtype int8 if that is wanted"
            )


def _max_tokens(
    directory: Path, network_config: NetworkConfig, sentence_config: JsonFile, serving: ServingConfig
) -> int:
    """Return the length of an input in tokens by sentence-transformers' rule.

    Its own limit may exceed the length that rotary positions were trained for, but not a table of positions. Without
    one, the tokenizer's limit and the trained length apply.
    """
    limits = [serving.max_tokens, max_length(sentence_config)]
    if not limits[1]:
        tokenizer = JsonFile(directory / "tokenizer_config.json")
        key = "model_max_length" if tokenizer.has("model_max_length") else "max_len"  # before transformers 3
        limits.append(int(tokenizer.positive_float(key)) if tokenizer.has(key) else 0)
    if not limits[1] or isinstance(network_config, EncoderConfig | ClipConfig):
        limits.append(network_config.max_tokens)
    return min(limit for limit in limits if limit)


def _prompts(directory: Path) -> tuple[dict[str, str], str | None]:
    """Read config_sentence_transformers.json: its named prompts and the name of the default prompt."""
    file = JsonFile(directory / "config_sentence_transformers.json")
    if file.get("model_type", str, "SentenceTransformer") != "SentenceTransformer":
        raise file.error("model_type", "only 'SentenceTransformer' is implemented: others return no vector per text")
    prompts = {name: "" if text is None else text for name, text in file.get("prompts", dict, {}).items()}
    if any(not isinstance(prompt, str) for prompt in prompts.values()):
        raise file.error("prompts", "every prompt must be a string")
    default: str | None = file.get("default_prompt_name", str, None)
    if default in prompts:
        return prompts, default
    # sentence-transformers defines these two for every model; they are empty unless the file sets them.
    if default not in (None, "query", "document"):
        raise file.error("default_prompt_name", f"must be one of prompts, which defines {', '.join(prompts) or 'none'}")
    return prompts, None


def _modules(directory: Path) -> list[tuple[str, Path]]:
    """Read modules.json as (module type, directory) pairs: Transformer, Pooling, any number of Dense, Normalize.

    The network has several type names, including those of remote code (GME's MultiModalTransformer). The first module
    is called Transformer if its type ends in Transformer or CLIPModel.
    """
    path = directory / "modules.json"
    modules: list[tuple[str, Path]] = []
    for entry in read_json(path, list):
        module = entry if isinstance(entry, dict) else {"type": entry}
        module_type = str(module.get("type")).rsplit(".", 1)[-1]
        if not modules and module_type.endswith(("Transformer", "CLIPModel")):
            module_type = "Transformer"
        if module_type not in (*MODULE_TYPES, "Dropout") or module is not entry:
            raise ConfigError(f"{path}: module {module.get('type')!r} is not implemented")
        if module_type != "Dropout":  # which changes nothing outside training
            modules.append((module_type, directory / str(module.get("path", ""))))
    order = [module_type for module_type, _ in modules]
    if order != sorted(order, key=MODULE_TYPES.index):
        raise ConfigError(f"{path}: modules in the order {', '.join(order)} are not implemented")
    return modules


def _dense(directory: Path, hidden_size: int) -> tuple[Dense, ...]:
    """Read the Dense modules and check that each accepts the output size of the previous module."""
    dense: list[Dense] = []
    for path in [path for module_type, path in _modules(directory) if module_type == "Dense"]:
        config = JsonFile(path / "config.json", required=True)
        activation = config.get("activation_function", str, "torch.nn.modules.activation.Tanh")
        if activation not in _DENSE_ACTIVATIONS:
            raise config.error("activation_function", f"must be one of {', '.join(_DENSE_ACTIVATIONS)}")
        in_features = dense[-1].out_features if dense else hidden_size
        if config.positive_int("in_features") != in_features:
            raise config.error("in_features", f"the previous module outputs {in_features}")
        for key, supported in (
            ("use_residual", False),
            ("module_input_name", SENTENCE_EMBEDDING),
            ("module_output_name", SENTENCE_EMBEDDING),
        ):
            if config.get(key, type(supported), supported) != supported:
                raise config.error(key, f"only {supported!r} is implemented")
        out_features, bias = config.positive_int("out_features"), config.get("bias", bool, True)
        dense.append(Dense(path, in_features, out_features, bias, _DENSE_ACTIVATIONS[activation]))
    return tuple(dense)


def _pooling(directory: Path, serving: ServingConfig, family_pooling: str | None) -> str:
    """Return the pooling mode, from the family, the Pooling module's config.json or config.pbtxt.

    There is no default, because a wrong guess produces wrong vectors.

    Args:
        family_pooling: The mode that the family fixes; None if the checkpoint or the operator decides.

    Raises:
        ConfigError: No source sets a mode, two sources disagree, or the mode is not implemented.
    """
    if family_pooling is not None:
        if serving.pooling not in ("", family_pooling):
            raise ConfigError(
                f"{serving.name}/config.pbtxt: pooling is '{serving.pooling}'; the family requires '{family_pooling}'"
            )
        return family_pooling
    pooling_directory = next(
        (path for module_type, path in _modules(directory) if module_type == "Pooling"), directory / "1_Pooling"
    )
    file = JsonFile(pooling_directory / "config.json")
    if not file.get("include_prompt", bool, True):
        raise file.error("include_prompt", "only true is implemented")
    if file.has("pooling_mode"):  # format of sentence-transformers 5 and later
        value = file.get("pooling_mode", (str, list), "")
        modes = [_pooling_mode(name) for name in ([value] if isinstance(value, str) else value)]
    else:
        switches = [key for key, enabled in file.values.items() if key.startswith("pooling_mode_") and enabled is True]
        modes = [_POOLING_MODES.get(key, key) for key in switches]
    supported = ", ".join(_POOLING_MODES.values())
    if len(modes) > 1 or not set(modes) <= set(_POOLING_MODES.values()):
        raise ConfigError(f"{file.path}: pooling '{'+'.join(modes)}' is not implemented; use one of {supported}")
    if not modes and not serving.pooling:
        raise ConfigError(f"{file.path} sets no pooling mode; set pooling ({supported}) in {serving.name}/config.pbtxt")
    pooling = serving.pooling or modes[0]
    if pooling not in _POOLING_MODES.values():
        raise ConfigError(
            f"{serving.name}/config.pbtxt: pooling '{pooling}' is not implemented; use one of {supported}"
        )
    if modes and modes[0] != pooling:
        raise ConfigError(f"{file.path} says pooling '{modes[0]}', {serving.name}/config.pbtxt says '{pooling}'")
    return pooling


def _pooling_mode(name: object) -> str:
    """Return this engine's name of a pooling mode that sentence-transformers 5 writes."""
    return {"lasttoken": "last"}.get(str(name), str(name))


def _matryoshka(config: JsonFile, dimensions: int, serving: ServingConfig) -> Literal[True] | tuple[int, ...] | None:
    """Return the output dimensions that the model was trained for; config.pbtxt overrides the checkpoint.

    A family may list dimensions for checkpoints of several sizes: those above this checkpoint's `dimensions` are
    ignored.
    """
    if serving.is_matryoshka or serving.matryoshka_dimensions:
        trained, source = serving.matryoshka_dimensions, f"{serving.name}/config.pbtxt"
    else:
        trained, source = tuple(config.get("matryoshka_dimensions", list, [])), str(config.path)
        if not trained and not config.get("is_matryoshka", bool, False):
            return None
    if any(type(count) is not int or count < 1 for count in trained):
        raise ConfigError(f"{source}: matryoshka_dimensions {list(trained)} must all be whole numbers above 0")
    return tuple(count for count in trained if count <= dimensions) if trained else True
