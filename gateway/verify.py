"""`triton-embed verify MODEL`: is it right? A checkpoint is served for real and its vectors are compared.

With the scores its public model card prints, with transformers or sentence-transformers, and with itself: one input
alone and among others.
"""

import argparse
import json
import logging
import re
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from triton_embed.gateway import repository
from triton_embed.gateway.repository import Checkpoint, RepositoryError

if TYPE_CHECKING:
    from triton_embed.python_backend.config import ServingConfig

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Subject:
    """What is verified: a model directory to be written, and the name that cards may know it by."""

    family: str  # the model directory that is copied
    name: str
    parameters: Mapping[str, str]  # set in its config.pbtxt
    known_as: str  # a Hugging Face id, or a directory's last part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments beside `--checkpoints` and `--log-level`, which every command has."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint's directory, a Hugging Face id that was downloaded, or a model of the repository",
    )
    parser.add_argument("--model-repository", type=Path, default=ROOT / "model_repository")
    parser.add_argument("--card", metavar="ID", help="compare with the card of this id (default: by the name of MODEL)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="holds the images that cards name by URL")
    parser.add_argument(
        "--parameter",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of config.pbtxt, as dtype=bfloat16 or image_positions=sequential; repeatable",
    )


def run(options: argparse.Namespace) -> int:
    """0: all that was compared agrees; 1: something differs, or could not be compared.

    RepositoryError or ConfigError: there is no such model, its checkpoint is not on this machine, or it does not load.
    """
    with tempfile.TemporaryDirectory(prefix="triton-embed-") as scratch:
        subject = _find(options)
        made = repository.write_model(
            options.model_repository, subject.family, Path(scratch), subject.name, subject.parameters
        )
        serving, directory = _checkpoint(options, made)
        log.info("%s is served as %s", directory, subject.family)
        return _compare(options, subject.known_as, made, serving, directory)


def _compare(options: argparse.Namespace, known_as: str, made: Path, serving: "ServingConfig", directory: Path) -> int:
    # After what can be refused at once: these imports take a second.
    from triton_embed.gateway import report
    from triton_embed.gateway.cards import cards_of, read_cards
    from triton_embed.gateway.examine import ExamineError, examine
    from triton_embed.gateway.oracle import Facts
    from triton_embed.gateway.triton_process import TritonOptions

    known = read_cards()
    cards = cards_of(known, options.card or known_as)
    if options.card and not cards:
        ids = ", ".join(sorted({card.checkpoint for card in known}))
        raise RepositoryError(f"--card {options.card}: no scores are known of it; known are {ids}")
    triton = TritonOptions(
        repository=made.parent,
        models=(made.name,),
        verbose=options.log_level == "debug",
        checkpoints=options.checkpoints,
    )
    inputs = [one for card in cards for one in card.inputs]
    try:
        answers = examine(triton, made.name, inputs, options.images)
    except ExamineError as error:
        raise RepositoryError(str(error)) from None
    if not cards:
        log.info("no scores of a card are known for %s; --card ID takes those of another id", known_as)
    image_tokens = (serving.min_image_tokens, serving.max_image_tokens)
    return report.conclude(answers, cards, Facts(directory, answers.info, serving.image_positions, image_tokens))


def _find(options: argparse.Namespace) -> Subject:
    """What MODEL names."""
    given, source = options.model, options.model_repository
    stated = dict(map(_stated, options.parameter))
    directory = Path(given).expanduser()
    if (directory / "config.json").is_file():
        directory = directory.resolve()
        return _of_checkpoint(Checkpoint(directory, str(directory)), source, stated)
    for name in repository.families(source):
        checkpoint = repository.read_config(source, name).parameters["checkpoint"].string_value
        if given in (name, checkpoint):
            return Subject(name, name, stated, Path(checkpoint).name if checkpoint.startswith("/") else checkpoint)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        raise RepositoryError(
            f"{given} is neither a directory that holds a config.json, nor an id like Qwen/Qwen3-Embedding-0.6B, "
            f"nor a model of {source}"
        )
    directory = options.checkpoints.absolute() / given
    if not (directory / "config.json").is_file():
        raise _lacking(given, directory, options.checkpoints)
    return _of_checkpoint(Checkpoint(directory, given, given), source, stated)


def _of_checkpoint(checkpoint: Checkpoint, source: Path, stated: dict[str, str]) -> Subject:
    family, name = repository.family_of(checkpoint.directory, source), repository.model_name(checkpoint.title)
    parameters = {**repository.facts(checkpoint, family, source, name), **stated}
    return Subject(family, name, parameters, checkpoint.id or checkpoint.title)


def _stated(pair: str) -> tuple[str, str]:
    key, equals, value = pair.partition("=")
    if not equals:
        raise RepositoryError(f"--parameter {pair} is not KEY=VALUE")
    return key, value


def _checkpoint(options: argparse.Namespace, made: Path) -> tuple["ServingConfig", Path]:
    """(config.pbtxt as the engine reads it, directory of the checkpoint), which must hold weights."""
    from triton_embed.python_backend import checkpoint
    from triton_embed.python_backend.config import ServingConfig

    stated = repository.read_config(made.parent, made.name).parameters
    parameters = {key: {"string_value": value.string_value} for key, value in stated.items()}
    config = json.dumps({"name": made.name, "parameters": parameters})
    read = ServingConfig.from_triton({"model_config": config, "model_repository": str(made)})
    serving = replace(read, checkpoint_root=options.checkpoints.absolute())
    directory = checkpoint.locate(serving)
    if directory is None:
        looked = checkpoint.directory_of(serving.checkpoint, serving.checkpoint_root)
        raise _lacking(serving.checkpoint, looked, options.checkpoints)
    repository.check_weights(Checkpoint(directory, serving.checkpoint))
    checkpoint.weight_files(directory)
    return serving, directory


def _lacking(checkpoint: str, directory: Path, root: Path) -> RepositoryError:
    message = f"{checkpoint} is not on this machine: looked in {directory}"
    if not checkpoint.startswith("/"):
        message += f". Fetch it with: {shlex.join(['triton-embed', 'download', checkpoint, f'--checkpoints={root}'])}"
    return RepositoryError(message)
