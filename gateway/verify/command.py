"""`triton-embed verify MODEL`: serve a checkpoint and compare its vectors.

They are compared with the scores of its model card, with transformers or sentence-transformers, and with each other:
one input alone and in a batch.
"""

import argparse
import json
import logging
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from triton_embed.gateway.locations import FAMILIES
from triton_embed.gateway.process.scratch import scratch_directory
from triton_embed.python_backend.checkpoint import repository
from triton_embed.python_backend.checkpoint.network_folder import network_directory
from triton_embed.python_backend.checkpoint.repository import Checkpoint, RepositoryError

if TYPE_CHECKING:
    from triton_embed.python_backend.checkpoint.config import ServingConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """The model to verify: how to generate its model directory, and which cards to compare it with."""

    family: str  # the model directory to copy
    name: str  # of the generated directory
    parameters: Mapping[str, str]  # set in its config.pbtxt
    card_name: str  # a Hugging Face id, or the last part of a directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command, besides those that every command has."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint's directory, a Hugging Face id that was downloaded, or a model of the repository",
    )
    parser.add_argument("--model-repository", type=Path, default=FAMILIES)
    parser.add_argument("--card", metavar="ID", help="compare with the card of this id (default: by the name of MODEL)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="directory of the images that cards name by URL")
    parser.add_argument(
        "--parameter",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of config.pbtxt, such as dtype=bfloat16 or image_positions=sequential; repeatable",
    )


def run(options: argparse.Namespace) -> int:
    """Verify a model. Return 0 if everything agrees, 1 if something differs or could not be compared.

    Raises:
        RepositoryError, ConfigError: if the model does not exist, its checkpoint is missing, or it does not load.
    """
    with scratch_directory() as scratch:
        subject = _find_subject(options)
        model = repository.write_model(
            options.model_repository, subject.family, scratch / "models", subject.name, subject.parameters
        )
        serving, directory = _checkpoint(options, model)
        log.info("%s is served as %s", directory, subject.family)
        return _compare(options, subject.card_name, model, serving, directory)


def _compare(
    options: argparse.Namespace, card_name: str, model: Path, serving: "ServingConfig", directory: Path
) -> int:
    # These imports take a second, so errors of the command line come first.
    from triton_embed.gateway.process.triton_process import TritonOptions
    from triton_embed.gateway.verify import report
    from triton_embed.gateway.verify.model_cards import cards_of, read_cards
    from triton_embed.gateway.verify.oracle import CheckpointFacts
    from triton_embed.gateway.verify.probe import ProbeError, probe

    all_cards = read_cards()
    cards = cards_of(all_cards, options.card or card_name)
    if options.card and not cards:
        ids = ", ".join(sorted({card.checkpoint for card in all_cards}))
        raise RepositoryError(f"--card {options.card}: there is no such card; there are {ids}")
    triton = TritonOptions(
        repository=model.parent,
        verbose=options.log_level == "debug",
        checkpoints=options.checkpoints,
    )
    inputs = [item for card in cards for item in card.inputs]
    try:
        result = probe(triton, model.name, inputs, options.images)
    except ProbeError as error:
        raise RepositoryError(str(error)) from None
    if not cards:
        log.info("there is no card for %s; --card ID uses the card of another id", card_name)
    image_tokens = (serving.min_image_tokens, serving.max_image_tokens)
    network = network_directory(directory)
    facts = CheckpointFacts(directory, result.info, serving.image_positions, image_tokens, network)
    return report.conclude(result, cards, facts)


def _find_subject(options: argparse.Namespace) -> Subject:
    """Return the model that MODEL names, searched as a directory, a model of the repository, and a downloaded id."""
    from triton_embed.python_backend.checkpoint import files

    name_or_path, source = options.model, options.model_repository
    parameters = dict(map(_parameter, options.parameter))
    directory = Path(os.path.expanduser(name_or_path))
    if files.is_checkpoint(directory):
        directory = directory.resolve()
        return _subject_of(Checkpoint(directory, str(directory)), source, parameters)
    for name in repository.model_names(source):
        checkpoint = repository.read_config(source, name).parameters["checkpoint"].string_value
        if name_or_path in (name, checkpoint):
            card_name = Path(checkpoint).name if checkpoint.startswith("/") else checkpoint
            return Subject(name, name, parameters, card_name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path):
        raise RepositoryError(
            f"{name_or_path} is neither a directory with a config.json, nor an id like Qwen/Qwen3-Embedding-0.6B, "
            f"nor a model of {source}"
        )
    directory = options.checkpoints.absolute() / name_or_path
    if not files.is_checkpoint(directory):
        raise _missing(name_or_path, directory, options.checkpoints)
    return _subject_of(Checkpoint(directory, name_or_path, name_or_path), source, parameters)


def _subject_of(checkpoint: Checkpoint, source: Path, overrides: dict[str, str]) -> Subject:
    family, name = repository.family_of(checkpoint.directory, source), repository.model_name(checkpoint.title)
    parameters = {**repository.checkpoint_parameters(checkpoint, family, source, name), **overrides}
    return Subject(family, name, parameters, checkpoint.id or checkpoint.title)


def _parameter(pair: str) -> tuple[str, str]:
    key, equals, value = pair.partition("=")
    if not equals:
        raise RepositoryError(f"--parameter {pair} is not KEY=VALUE")
    return key, value


def _checkpoint(options: argparse.Namespace, model: Path) -> tuple["ServingConfig", Path]:
    """Return (config.pbtxt as the engine reads it, directory of the checkpoint).

    Raises:
        RepositoryError, ConfigError: if the checkpoint or its weights are missing.
    """
    from triton_embed.python_backend.checkpoint import files
    from triton_embed.python_backend.checkpoint.config import ServingConfig

    declared = repository.read_config(model.parent, model.name).parameters
    parameters = {key: {"string_value": value.string_value} for key, value in declared.items()}
    config = json.dumps({"name": model.name, "parameters": parameters})
    serving = ServingConfig.from_triton({"model_config": config, "model_repository": str(model)})
    serving = replace(serving, checkpoint_root=options.checkpoints.absolute())
    directory = files.locate(serving)
    if directory is None:
        expected = files.directory_of(serving.checkpoint, serving.checkpoint_root)
        raise _missing(serving.checkpoint, expected, options.checkpoints)
    repository.check_weights(Checkpoint(directory, serving.checkpoint))
    files.weight_files(network_directory(directory))
    return serving, directory


def _missing(checkpoint: str, directory: Path, root: Path) -> RepositoryError:
    message = f"{checkpoint} is not on this machine: looked in {directory}"
    if not checkpoint.startswith("/"):
        message += f". Fetch it with: {shlex.join(['triton-embed', 'download', checkpoint, f'--checkpoints={root}'])}"
    return RepositoryError(message)
