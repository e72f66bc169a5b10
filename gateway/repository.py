"""Model directories written for a checkpoint: which family it belongs to, and that family's files with its facts."""

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

FAMILY_TAG = "family"  # a metric tag of models with another checkpoint than their family's: whose files they hold
HEADING = "# What the operator decides. Every parameter and its default: python_backend/config.py\n"
# 1_Pooling/config.json's switches -> the words of config.pbtxt; the engine refuses others by their own name
POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
# What the Chinese BGE checkpoints were trained with, from their model cards.
CHINESE_QUERY = "为这个句子生成表示以用于检索相关文章："


class RepositoryError(ValueError):
    """The operator asked for a model that cannot be written. The message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by what it is called and where its files are, or will be once they are downloaded."""

    directory: Path
    stated: str  # config.pbtxt's `checkpoint`: a Hugging Face id, or the absolute directory
    id: str = ""  # its Hugging Face id, where that is known

    @property
    def title(self) -> str:
        """The id's last part, else the directory's name."""
        return self.id.partition("/")[2] or self.directory.name

    @property
    def names(self) -> list[str]:
        """What clients may call it beside its model's name; a comma ends an alias."""
        return [name for name in (self.id, self.title) if name and "," not in name]


def families(repository: Path) -> list[str]:
    """Names of the model directories in a repository."""
    found = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if not found:
        raise RepositoryError(f"{repository} holds no model directory")
    return found


def originals(repository: Path) -> list[str]:
    """The families proper: the model directories that were not written here, from another's files."""
    found = [name for name in families(repository) if FAMILY_TAG not in read_config(repository, name).metric_tags]
    if not found:
        raise RepositoryError(f"{repository} holds no family, only models that were added to it")
    return found


def family_of(checkpoint: Path, repository: Path) -> str:
    """The family that serves a checkpoint: by config.json's model_type, then by the pooling it states.

    Where several serve a model_type and none pools that way, it is the one without an instruction of its own.
    """
    model_type = _read(checkpoint / "config.json", required=True).get("model_type")
    served: dict[str, Any] = {}  # family -> its parameters
    known: set[str] = set()
    for family in originals(repository):
        parameters = read_config(repository, family).parameters
        types = [item.strip() for item in parameters["model_types"].string_value.split(",")]
        known.update(types)
        if model_type in types:
            served[family] = parameters
    if not served:
        raise RepositoryError(
            f"{checkpoint / 'config.json'}: model_type '{model_type}' belongs to no family; "
            f"served are {', '.join(sorted(known))}"
        )
    if len(served) == 1:
        return next(iter(served))
    poolings = {family: parameters["pooling"].string_value for family, parameters in served.items()}
    stated = stated_pooling(checkpoint)
    plain = [family for family, parameters in served.items() if "query_instruction" not in parameters]
    fitting = [family for family, pooling in poolings.items() if pooling == stated] or plain
    if not stated or len(fitting) != 1:
        raise RepositoryError(
            f"{checkpoint / '1_Pooling' / 'config.json'} states pooling '{stated or 'nothing'}'; "
            f"of model_type '{model_type}' are "
            + " and ".join(f"{family} ({pooling})" for family, pooling in poolings.items())
        )
    return fitting[0]


def stated_pooling(checkpoint: Path) -> str:
    """What the checkpoint's Pooling module states, in config.pbtxt's words; empty where it states nothing."""
    modules = [module for module in _read(checkpoint / "modules.json", list) if isinstance(module, dict)]
    places = [str(module.get("path", "")) for module in modules if str(module.get("type")).endswith(".Pooling")]
    stated = _read(checkpoint / (places[0] if places else "1_Pooling") / "config.json")
    if mode := stated.get("pooling_mode"):  # the form sentence-transformers 5 and later write
        named = [mode] if isinstance(mode, str) else mode
        return "+".join("last" if name == "lasttoken" else str(name) for name in named)
    return "+".join(
        POOLING.get(key, key) for key, on in stated.items() if key.startswith("pooling_mode_") and on is True
    )


def model_name(title: str) -> str:
    """A checkpoint's title as a name that Triton, URLs and shells take as it is."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", title).lstrip(".-") or "model"


def check_name(name: str, repository: Path) -> None:
    """RepositoryError: it is no name for a model, or taken: the gateway does not tell upper from lower case."""
    if name != model_name(name):
        raise RepositoryError(f"'{name}' is no name for a model: letters, digits, '_', '-' and '.', not first, are")
    for path in repository.glob("*"):
        if path.name.lower() == name.lower():
            raise RepositoryError(f"{path} exists: choose another name with --name")


def check_place(repository: Path) -> None:
    """RepositoryError: tritonserver would wait for ever; its Python backend splits a stub's command line at spaces."""
    if " " in str(repository):
        raise RepositoryError(f"{repository}: Triton cannot load models from a path with a space in it")


def loaded_by(asked: Checkpoint, repository: Path) -> list[str]:
    """The models of a repository that load a checkpoint already."""
    names = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    stated = [read_config(repository, name).parameters["checkpoint"].string_value for name in names]
    return [name for name, checkpoint in zip(names, stated, strict=True) if checkpoint == asked.stated]


def check_weights(checkpoint: Checkpoint) -> None:
    """RepositoryError: there is no safetensors file, with the command that makes one."""
    if any(checkpoint.directory.glob("*.safetensors")):
        return
    load = f"AutoModel.from_pretrained({checkpoint.stated!r})"
    convert = f"from transformers import AutoModel; {load}.save_pretrained({str(checkpoint.directory)!r})"
    raise RepositoryError(
        f"{checkpoint.stated} has no *.safetensors file, and no pickle (pytorch_model.bin) is ever loaded. "
        f"If you trust it, convert it once, then try again: {shlex.join([sys.executable, '-c', convert])}"
    )


def facts(checkpoint: Checkpoint, family: str, repository: Path, name: str) -> dict[str, str]:
    """What `name`'s config.pbtxt says of a checkpoint that the family's does not; an empty value drops the family's."""
    parameters = read_config(repository, family).parameters
    found = {"checkpoint": checkpoint.stated}
    if checkpoint.stated != checkpoint.id:  # of an id, the gateway makes these itself
        found["aliases"] = ", ".join(alias for alias in checkpoint.names if alias != name)
    if "pooling" in parameters and (pooling := stated_pooling(checkpoint.directory)):
        found["pooling"] = pooling
    model_type = _read(checkpoint.directory / "config.json").get("model_type")
    if model_type == "xlm-roberta":
        found["query_instruction"] = ""  # bge-m3 and multilingual-e5 were trained without BGE's sentence
    elif model_type == "bert" and "query_instruction" in parameters and "-zh" in checkpoint.title.lower():
        found["query_instruction"] = CHINESE_QUERY
    return found


def read_config(repository: Path, model: str) -> model_config_pb2.ModelConfig:
    """A model's config.pbtxt."""
    file = repository / model / "config.pbtxt"
    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except OSError:
        raise RepositoryError(f"{file} cannot be read") from None
    except text_format.ParseError as error:
        raise RepositoryError(f"{file}: {error}") from None


def write_model(source: Path, family: str, target: Path, name: str, parameters: Mapping[str, str]) -> Path:
    """Copy `source/family` to `target/name` with these parameters set, and those that are empty dropped.

    Nothing in `source` changes.
    """
    config = read_config(source, family)
    config.name = name
    if "checkpoint" in parameters:
        config.metric_tags[FAMILY_TAG] = family
        # These describe the checkpoint the family came with.
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


def install(made: Path, repository: Path) -> Path:
    """Move a model directory that is complete into a repository: whole, or not at all."""
    directory = repository / made.name
    check_name(made.name, repository)
    repository.mkdir(exist_ok=True)
    try:
        shutil.move(made, directory)  # a rename, where both are on one file system
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


def _read(file: Path, kind: type = dict, required: bool = False) -> Any:
    """What a JSON file holds, of this kind; an empty one where it is not there or holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        if required:
            raise RepositoryError(f"{file} is missing: what is asked for is the directory that holds it") from None
        return kind()
    except ValueError:
        raise RepositoryError(f"{file} is not valid JSON") from None
    return found if isinstance(found, kind) else kind()
