"""Model directories written for a checkpoint: which family it belongs to, and that family's files with its facts."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2


class RepositoryError(ValueError):
    """The operator asked for a model that cannot be written. The message says why."""


def families(repository: Path) -> list[str]:
    """Names of the model directories in a repository."""
    found = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if not found:
        raise RepositoryError(f"{repository} holds no model directory")
    return found


def family_of(checkpoint: Path, repository: Path) -> str:
    """The family that serves a checkpoint: by config.json's model_type, then by the pooling 1_Pooling states."""
    model_type = _read(checkpoint / "config.json").get("model_type")
    served: dict[str, str] = {}  # family -> the pooling it states
    known: set[str] = set()
    for family in families(repository):
        parameters = read_config(repository, family).parameters
        types = [item.strip() for item in parameters["model_types"].string_value.split(",")]
        known.update(types)
        if model_type in types:
            served[family] = parameters["pooling"].string_value
    if not served:
        raise RepositoryError(
            f"{checkpoint / 'config.json'}: model_type '{model_type}' belongs to no family; "
            f"served are {', '.join(sorted(known))}"
        )
    if len(served) == 1:
        return next(iter(served))
    file = checkpoint / "1_Pooling" / "config.json"
    stated = _read(file) if file.is_file() else {}
    mode = stated.get("pooling_mode") or next(
        (key.split("_")[2] for key, on in stated.items() if key.startswith("pooling_mode_") and on is True), ""
    )
    for family, pooling in served.items():
        if pooling == mode:
            return family
    raise RepositoryError(
        f"{file} states pooling '{mode or 'nothing'}'; of model_type '{model_type}' are "
        + " and ".join(f"{family} ({pooling})" for family, pooling in served.items())
    )


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
    """Copy `source/family` to `target/name` with these parameters set; nothing in `source` changes."""
    config = read_config(source, family)
    config.name = name
    if "checkpoint" in parameters:
        # These describe the checkpoint the family came with.
        for key in ("checkpoint_package", "aliases"):
            config.parameters.pop(key, None)
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    directory = target / name
    shutil.copytree(source / family / "1", directory / "1", ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
    return directory


def _read(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise RepositoryError(f"{file} is missing: --model-path takes the directory that holds it") from None
    except ValueError:
        raise RepositoryError(f"{file} is not valid JSON") from None
    return found if isinstance(found, dict) else {}
