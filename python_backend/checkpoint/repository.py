"""Model directories for checkpoints: find the family of a checkpoint and copy the family with other parameters."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from triton_embed.python_backend.checkpoint.network_folder import network_directory

FAMILY_TAG = "family"  # metric tag of a generated model directory: the family it was copied from
HEADING = "# Parameters set by the operator. Every parameter and its default: python_backend/checkpoint/config.py\n"
# Keys of 1_Pooling/config.json -> values of `pooling` in config.pbtxt; the engine refuses other keys by name.
POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
# The instruction the Chinese BGE checkpoints were trained with, from their model cards.
CHINESE_QUERY = "为这个句子生成表示以用于检索相关文章："


class RepositoryError(ValueError):
    """A model directory cannot be read or written. The message tells the operator why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its names, and the directory of its files, which may not be downloaded yet."""

    directory: Path
    parameter: str  # `checkpoint` in config.pbtxt: a Hugging Face id, or the absolute directory
    id: str = ""  # Hugging Face id, if known

    @property
    def title(self) -> str:
        """The last part of the id, or the name of the directory."""
        return self.id.partition("/")[2] or self.directory.name

    @property
    def names(self) -> list[str]:
        """Aliases of the model. Names with a comma are left out, because commas separate aliases."""
        return [name for name in (self.id, self.title) if name and "," not in name]


def model_names(repository: Path) -> list[str]:
    """Return the names of the model directories in a repository.

    Raises:
        RepositoryError: There is none.
    """
    names = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if not names:
        raise RepositoryError(f"{repository} contains no model directory")
    return names


def family_names(repository: Path) -> list[str]:
    """Return the families: the model directories that are not copies of another one.

    Raises:
        RepositoryError: There is none, or a config.pbtxt cannot be read.
    """
    names = [name for name in model_names(repository) if FAMILY_TAG not in read_config(repository, name).metric_tags]
    if not names:
        raise RepositoryError(f"{repository} contains no family, only models that were added to it")
    return names


def family_of(checkpoint: Path, repository: Path, pooling: str = "") -> str:
    """Return the family that serves a checkpoint, by model_type in config.json, then by pooling.

    If several families serve the model_type and none of them has the pooling, return the one without a query
    instruction.

    Args:
        pooling: Taken if the checkpoint has none.

    Raises:
        RepositoryError: No family serves the model_type, several families fit, or a file cannot be read.
    """
    config = network_directory(checkpoint) / "config.json"
    model_type = _read(config, required=True).get("model_type")
    candidates: dict[str, Any] = {}  # family -> its parameters
    all_types: set[str] = set()
    for family in family_names(repository):
        parameters = read_config(repository, family).parameters
        types = [item.strip() for item in parameters["model_types"].string_value.split(",")]
        all_types.update(types)
        if model_type in types:
            candidates[family] = parameters
    if not candidates:
        raise RepositoryError(
            f"{config}: model_type '{model_type}' belongs to no family; supported: {', '.join(sorted(all_types))}"
        )
    if len(candidates) == 1:
        return next(iter(candidates))
    poolings = {family: parameters["pooling"].string_value for family, parameters in candidates.items()}
    pooling = checkpoint_pooling(checkpoint) or pooling
    plain = [family for family, parameters in candidates.items() if "query_instruction" not in parameters]
    matching = [family for family, value in poolings.items() if value == pooling] or plain
    if not pooling or len(matching) != 1:
        raise RepositoryError(
            f"{checkpoint / '1_Pooling' / 'config.json'} has pooling '{pooling or 'nothing'}'; "
            f"families of model_type '{model_type}': "
            + " and ".join(f"{family} ({value})" for family, value in poolings.items())
            + ("" if pooling else "; --pooling sets it")
        )
    return matching[0]


def checkpoint_pooling(checkpoint: Path) -> str:
    """Return the pooling of a checkpoint's Pooling module as a value of config.pbtxt; empty if it has none."""
    modules = [module for module in _read(checkpoint / "modules.json", list) if isinstance(module, dict)]
    paths = [str(module.get("path", "")) for module in modules if str(module.get("type")).endswith(".Pooling")]
    config = _read(checkpoint / (paths[0] if paths else "1_Pooling") / "config.json")
    if mode := config.get("pooling_mode"):  # written by sentence-transformers 5 and later
        modes = [mode] if isinstance(mode, str) else mode
        return "+".join("last" if name == "lasttoken" else str(name) for name in modes)
    return "+".join(
        POOLING.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value is True
    )


def model_name(title: str) -> str:
    """Return a checkpoint's title as a name that is valid in Triton, URLs and shells."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", title).lstrip(".-") or "model"


def check_name(name: str, repository: Path) -> None:
    """Check a model name.

    Raises:
        RepositoryError: The name is invalid, or exists in upper or lower case, because the gateway ignores case.
    """
    if name != model_name(name):
        raise RepositoryError(
            f"Invalid model name '{name}': use letters, digits, '_', '-' and '.'; it must not start with '-' or '.'"
        )
    for path in repository.glob("*"):
        if path.name.lower() == name.lower():
            raise RepositoryError(f"{path} exists: choose another name with --name")


def check_path(repository: Path) -> None:
    """Check the path of a repository and the names of its models.

    Raises:
        RepositoryError: The engine cannot open one, or a shell does not read it as one word: the Python backend starts
            stubs with an unquoted command, and tritonserver waits for ever for one that did not start.
    """
    check_is_ascii(repository)
    for path in (repository, *(config.parent for config in repository.glob("*/config.pbtxt"))):
        if shlex.quote(str(path)) != str(path):
            raise RepositoryError(f"{path}: Triton cannot load models from a path with a space or a shell's characters")


def check_is_ascii(path: Path) -> None:
    """Check that the engine can open a path: the Python inside Triton's stub encodes paths as ASCII.

    Raises:
        RepositoryError: It cannot.
    """
    if not str(path).isascii():
        raise RepositoryError(
            f"{path}: Triton's Python backend opens paths in ASCII only; move it, or name a link to it (ln -s)"
        )


def loaded_by(checkpoint: Checkpoint, repository: Path) -> list[str]:
    """Return the models of a repository that already load a checkpoint."""
    names = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    loaded = [read_config(repository, name).parameters["checkpoint"].string_value for name in names]
    return [name for name, value in zip(names, loaded, strict=True) if value == checkpoint.parameter]


def check_weights(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint has safetensors files.

    Raises:
        RepositoryError: It has none; the message has the command that converts its weights.
    """
    network = network_directory(checkpoint.directory)
    if any(network.glob("*.safetensors")):
        return
    source = checkpoint.parameter if network == checkpoint.directory else str(network)
    load = f"AutoModel.from_pretrained({source!r})"
    convert = f"from transformers import AutoModel; {load}.save_pretrained({str(network)!r})"
    raise RepositoryError(
        f"{checkpoint.parameter} has no *.safetensors file, and pickles (pytorch_model.bin) are never loaded. "
        f"If you trust it, convert it once, then try again: {shlex.join([sys.executable, '-c', convert])}"
    )


def checkpoint_parameters(checkpoint: Checkpoint, family: str, repository: Path, name: str) -> dict[str, str]:
    """Return the parameters of a checkpoint that differ from its family's; an empty value removes a parameter.

    Args:
        name: The name of the model, which is not repeated among its aliases.
    """
    parameters = read_config(repository, family).parameters
    changes = {"checkpoint": checkpoint.parameter}
    if checkpoint.parameter != checkpoint.id:  # for an id, the gateway derives them
        changes["aliases"] = ", ".join(alias for alias in checkpoint.names if alias != name)
    if "pooling" in parameters and (pooling := checkpoint_pooling(checkpoint.directory)):
        changes["pooling"] = pooling
    model_type = _read(checkpoint.directory / "config.json").get("model_type")
    if model_type == "xlm-roberta":
        changes["query_instruction"] = ""  # bge-m3 and multilingual-e5 were trained without BGE's instruction
    elif model_type == "bert" and "query_instruction" in parameters and "-zh" in checkpoint.title.lower():
        changes["query_instruction"] = CHINESE_QUERY
    return changes


def read_config(repository: Path, model: str) -> model_config_pb2.ModelConfig:
    """Read the config.pbtxt of a model.

    Raises:
        RepositoryError: The file cannot be read, or is not a model configuration.
    """
    file = repository / model / "config.pbtxt"
    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except OSError:
        raise RepositoryError(f"{file} cannot be read") from None
    except text_format.ParseError as error:
        raise RepositoryError(f"{file}: {error}") from None


def write_model(source: Path, family: str, target: Path, name: str, parameters: Mapping[str, str]) -> Path:
    """Copy `source/family` to `target/name` with other parameters; an empty value removes a parameter."""
    config = read_config(source, family)
    config.name = name
    if "checkpoint" in parameters:
        config.metric_tags[FAMILY_TAG] = family
        # These parameters belong to the family's default checkpoint.
        for key in ("checkpoint_package", "aliases"):
            config.parameters.pop(key, None)
    for key, value in parameters.items():
        if value:
            config.parameters[key].string_value = value
        else:
            config.parameters.pop(key, None)
    directory = target / name
    shutil.copytree(source / family / "1", directory / "1", ignore=shutil.ignore_patterns("__pycache__"))
    text = HEADING + text_format.MessageToString(config, as_utf8=True)
    (directory / "config.pbtxt").write_text(text, encoding="utf-8")
    return directory


def install(model: Path, repository: Path) -> Path:
    """Install a complete model directory in a repository by moving it there. An error leaves nothing behind.

    Raises:
        RepositoryError: A model has this name already.
    """
    directory = repository / model.name
    check_name(model.name, repository)
    repository.mkdir(parents=True, exist_ok=True)
    try:
        shutil.move(model, directory)  # a rename if both are on one file system
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


def _read(file: Path, kind: type = dict, required: bool = False) -> Any:
    """Return the content of a JSON file, or an empty `kind` if it is missing or of another type."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        if required:
            raise RepositoryError(f"{file} is missing: name the directory that contains it") from None
        return kind()
    except ValueError:
        raise RepositoryError(f"{file} is not valid JSON") from None
    return content if isinstance(content, kind) else kind()
