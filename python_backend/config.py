"""The place for the engine's defaults: what the operator decides (ServingConfig) and what the checkpoint states
(ModelConfig)."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.json_file import JsonFile, read_json
from triton_embed.python_backend.row import Channels
from triton_embed.python_backend.shapes import Shape
from triton_embed.python_backend.spec import Spec

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
IMAGE_POSITIONS = ("mrope", "sequential")
KERNELS = ("auto", "torch")


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
    dtype: str = "auto"  # auto: bf16 on a GPU, or on a CPU that multiplies it if vectors stay right; int8: on a CPU
    pooling: str = ""  # must agree with the checkpoint's 1_Pooling, or stand in for it
    max_tokens: int = 0  # 0: what the checkpoint allows; otherwise a lower limit
    max_batch_tokens: int = 0  # tokens of one forward pass; 0: what suits the device and the network
    max_request_tokens: int = 300_000
    matryoshka_dimensions: tuple[int, ...] = ()
    is_matryoshka: bool = False
    query_instruction: str = ""  # what prompt_name "query" stands for where the checkpoint names no prompts
    image_positions: str = "mrope"  # or sequential: how GME numbers image tokens
    min_image_tokens: int = 256  # of a picture, for models that keep its shape
    max_image_tokens: int = 1_280
    threads: int = 0  # 0: every core this process may use
    kernels: str = "auto"  # auto: Triton's on a GPU; torch: no Triton kernels anywhere
    cuda_graphs: bool = True  # on a GPU: small batches as one launch
    prefix_reuse: bool = True  # causal models: an instruction met again is not computed again
    cache_bytes: int = 0  # of vectors kept for inputs that come again; 0: none

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
        everywhere = os.environ.get("TRITON_EMBED_DTYPE")  # of models that state none
        stated = {"dtype": everywhere} if everywhere else {}
        stated |= {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        settable = {f.name: f.type for f in fields(cls) if f.name not in {"name", "checkpoint_root", "device"}}
        values: dict[str, Any] = {}
        for key, text in stated.items():
            if key not in settable:
                raise ConfigError(
                    f"{config['name']}/config.pbtxt: unknown parameter '{key}'; known are {', '.join(settable)}"
                )
            values[key] = _parse(f"{config['name']}/config.pbtxt: {key}", text, settable[key])
        for key, known in (("dtype", DTYPES), ("image_positions", IMAGE_POSITIONS), ("kernels", KERNELS)):
            if values.get(key, known[0]) not in known:
                raise ConfigError(
                    f"{config['name']}/config.pbtxt: {key} is '{values[key]}', not one of {', '.join(known)}"
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

# 1_Pooling/config.json's switches -> our names; sentence-transformers' other modes are refused by name
_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
MODULES = ("Transformer", "Pooling", "Dense", "Normalize")  # of modules.json, in the only order there is
SENTENCE = "sentence_embedding"  # sentence-transformers' name of the pooled vector
# sentence-transformers' activation of a Dense module -> kernels.ops names
_DENSE_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": None,
    "torch.nn.modules.activation.GELU": "gelu_erf",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Tanh": "tanh",
}


@dataclass(frozen=True)
class Dense:
    """A sentence-transformers Dense module: a projection of the pooled vector."""

    directory: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str | None


@dataclass(frozen=True)
class ModelConfig:
    """What the checkpoint's own files state. Lengths in tokens."""

    model_type: str
    shape: Shape
    pooling: str
    max_tokens: int
    dense: tuple[Dense, ...] = ()
    lowercase: bool = False
    matryoshka: Literal[True] | tuple[int, ...] | None = None  # True: any size; None: the model was not trained for it
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None  # the name of the prompt of texts that come without one
    image_positions: str = "mrope"
    normalisation: tuple[Channels, ...] = ()  # mean and standard deviation of a picture's pixels

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def dimensions(self) -> int:
        """Values of a full vector."""
        return self.dense[-1].outputs if self.dense else self.shape.hidden_size

    @classmethod
    def from_checkpoint(cls, directory: Path, serving: ServingConfig, spec: Spec) -> "ModelConfig":
        """Read config.json and sentence-transformers' files beside it. ConfigError: file, key and both values."""
        config = JsonFile(directory / "config.json", required=True)
        model_type = config.need("model_type", str)
        if model_type not in serving.model_types:
            raise config.refuse(
                "model_type", f"{serving.name}/config.pbtxt serves {', '.join(serving.model_types) or 'none'}"
            )
        shape = spec.read(config)
        sentence = JsonFile(directory / "sentence_bert_config.json")
        length = sentence.size("max_seq_length") if sentence.has("max_seq_length") else 0
        dense = _dense(directory, shape.hidden_size)
        prompts, default_prompt = _prompts(directory)
        return cls(
            model_type=model_type,
            shape=shape,
            pooling=_pooling(directory, serving, spec.pooling),
            max_tokens=min(limit for limit in (shape.max_tokens, length, serving.max_tokens) if limit),
            dense=dense,
            lowercase=sentence.get("do_lower_case", bool, False),
            matryoshka=_matryoshka(config, dense[-1].outputs if dense else shape.hidden_size, serving),
            prompts=prompts,
            default_prompt=default_prompt,
            image_positions=serving.image_positions,
            normalisation=spec.normalisation(directory),
        )


def _prompts(directory: Path) -> tuple[dict[str, str], str | None]:
    """The named prompts of config_sentence_transformers.json, and the name of the one used by default."""
    file = JsonFile(directory / "config_sentence_transformers.json")
    prompts: dict[str, str] = file.get("prompts", dict, {})
    if any(not isinstance(prompt, str) for prompt in prompts.values()):
        raise file.refuse("prompts", "not all of which are strings")
    default: str | None = file.get("default_prompt_name", str, None)
    if default in prompts:
        return prompts, default
    # sentence-transformers gives every model these two, empty unless the file fills them.
    if default not in (None, "query", "document"):
        raise file.refuse("default_prompt_name", f"not one of prompts, which has {', '.join(prompts) or 'none'}")
    return prompts, None


def _modules(directory: Path) -> list[tuple[str, Path]]:
    """(kind, directory) of each module that modules.json lists: Transformer, Pooling, any Dense, Normalize.

    The network itself goes by several names, the remote code's own among them (GME's MultiModalTransformer).
    """
    path = directory / "modules.json"
    found: list[tuple[str, Path]] = []
    for module in read_json(path, list):
        stated = module if isinstance(module, dict) else {"type": module}
        kind = str(stated.get("type")).rsplit(".", 1)[-1]
        if not found and kind.endswith(("Transformer", "CLIPModel")):
            kind = "Transformer"
        if kind not in MODULES or stated is not module:
            raise ConfigError(f"{path}: module {stated.get('type')!r} is not implemented")
        found.append((kind, directory / str(stated.get("path", ""))))
    order = [kind for kind, _ in found]
    if order != sorted(order, key=MODULES.index):
        raise ConfigError(f"{path}: modules in the order {', '.join(order)} are not implemented")
    return found


def _dense(directory: Path, hidden: int) -> tuple[Dense, ...]:
    """The Dense modules, each taking what the one before it gives."""
    found: list[Dense] = []
    for path in [path for kind, path in _modules(directory) if kind == "Dense"]:
        config = JsonFile(path / "config.json", required=True)
        name = config.get("activation_function", str, "torch.nn.modules.activation.Tanh")
        if name not in _DENSE_ACTIVATIONS:
            raise config.refuse("activation_function", f"not one of {', '.join(_DENSE_ACTIVATIONS)}")
        inputs = found[-1].outputs if found else hidden
        if config.size("in_features") != inputs:
            raise config.refuse("in_features", f"the module before gives {inputs}")
        for key, only in (("use_residual", False), ("module_input_name", SENTENCE), ("module_output_name", SENTENCE)):
            if config.get(key, type(only), only) != only:
                raise config.refuse(key, f"only {only!r} is implemented")
        outputs, bias = config.size("out_features"), config.get("bias", bool, True)
        found.append(Dense(path, inputs, outputs, bias, _DENSE_ACTIVATIONS[name]))
    return tuple(found)


def _pooling(directory: Path, serving: ServingConfig, fixed: str | None) -> str:
    """The pooling mode: the family's `fixed` one, or from the Pooling module's config.json or the operator; there is no
    default, for a guess gives wrong vectors."""
    if fixed is not None:
        if serving.pooling not in ("", fixed):
            raise ConfigError(f"{serving.name}/config.pbtxt: pooling is '{serving.pooling}', the family has '{fixed}'")
        return fixed
    where = next((path for kind, path in _modules(directory) if kind == "Pooling"), directory / "1_Pooling")
    file = JsonFile(where / "config.json")
    if not file.get("include_prompt", bool, True):
        raise file.refuse("include_prompt", "only true is implemented")
    if file.has("pooling_mode"):  # the form sentence-transformers 5 and later write
        mode = file.get("pooling_mode", (str, list), "")
        chosen = [_stated_mode(name) for name in ([mode] if isinstance(mode, str) else mode)]
    else:
        switches = [key for key, on in file.values.items() if key.startswith("pooling_mode_") and on is True]
        chosen = [_POOLING.get(key, key) for key in switches]
    modes = ", ".join(_POOLING.values())
    if not chosen and not serving.pooling:
        raise ConfigError(f"{file.path} states no pooling: state it ({modes}) in {serving.name}/config.pbtxt")
    stated = "+".join(map(str, chosen))
    pooling = serving.pooling or stated
    if chosen and stated != pooling:
        raise ConfigError(f"{file.path} says pooling '{stated}', {serving.name}/config.pbtxt says '{pooling}'")
    if pooling not in _POOLING.values():
        raise ConfigError(f"{file.path}: pooling '{pooling}' is not implemented; {modes} are")
    return pooling


def _stated_mode(name: object) -> str:
    """sentence-transformers' short name of a mode -> ours."""
    return {"lasttoken": "last"}.get(str(name), str(name))


def _matryoshka(config: JsonFile, dimensions: int, serving: ServingConfig) -> Literal[True] | tuple[int, ...] | None:
    """Which output sizes the model was trained for; the operator's word wins over the checkpoint's.

    One list serves a family: sizes beyond this checkpoint's own do no harm, they are only not for it.
    """
    if serving.is_matryoshka or serving.matryoshka_dimensions:
        sizes, where = serving.matryoshka_dimensions, f"{serving.name}/config.pbtxt"
    else:
        sizes, where = tuple(config.get("matryoshka_dimensions", list, [])), str(config.path)
        if not sizes and not config.get("is_matryoshka", bool, False):
            return None
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ConfigError(f"{where}: matryoshka_dimensions {list(sizes)} are not all sizes above 0")
    return tuple(size for size in sizes if size <= dimensions) if sizes else True
