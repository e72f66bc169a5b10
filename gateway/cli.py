"""`triton-embed`: serve models, download and add checkpoints, verify a model."""

import argparse
import asyncio
import json
import logging
import re
import runpy
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from triton_embed.gateway.http import logs
from triton_embed.gateway.locations import CHECKPOINTS, FAMILIES, MODELS
from triton_embed.gateway.process.scratch import scratch_directory
from triton_embed.gateway.verify import command as verify
from triton_embed.python_backend.checkpoint import repository
from triton_embed.python_backend.checkpoint.network_folder import network_directory
from triton_embed.python_backend.checkpoint.repository import Checkpoint, RepositoryError
from triton_embed.python_backend.errors import ConfigError

if TYPE_CHECKING:
    from triton_embed.python_backend.checkpoint.config import ModelConfig

CHAT_TEMPLATES = ("gme-qwen2-vl",)
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
# Aliases that --dtype accepts -> value in config.pbtxt.
DTYPES = {"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Exit code 0: success or stopped by a signal; 1: failure; 2: wrong command line."""
    options = _parser().parse_args(arguments)
    logs.configure(options.log_level)
    try:
        sys.exit(options.run(options))
    except (RepositoryError, ConfigError) as error:
        sys.exit(f"triton-embed: {error}")


def serve(options: argparse.Namespace) -> int:
    """Run tritonserver and the gateway until stopped.

    Raises:
        RepositoryError, ConfigError: if a model cannot be served.
    """
    from triton_embed.gateway.settings import SettingsError, read_settings

    names = ("host", "port", "api_key", "served_model_name", "workers", "log_format", "cors_origins")
    overrides = {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        settings = read_settings(log_level=options.log_level, **overrides)
    except SettingsError as error:
        sys.exit(f"triton-embed: {error}")
    logs.configure(settings.log_level, settings.log_format)
    with scratch_directory() as scratch:
        repository.check_path(options.model_repository)
        repository.check_is_ascii(options.checkpoints)
        source = _repository(options, scratch / "models")
        repository.check_path(source)  # scratch is wherever TMPDIR says
        # These imports take a second, so errors of the command line come first.
        import uvloop

        from triton_embed.gateway.process.supervisor import ServeError, Supervisor
        from triton_embed.gateway.process.triton_process import TritonOptions

        triton = TritonOptions(
            repository=source,
            http_port=options.triton_http_port,
            grpc_port=options.triton_grpc_port,
            metrics_port=options.triton_metrics_port,
            verbose=options.log_level == "debug",
            checkpoints=options.checkpoints,
        )
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(Supervisor(settings, triton).run())
            return 0
        except (SettingsError, ServeError) as error:
            sys.exit(f"triton-embed: {error}")


def download(options: argparse.Namespace) -> int:
    """Download a checkpoint into checkpoints/<org>/<name>.

    Raises:
        ConfigError: if the hub refuses or cannot be reached.
    """
    from triton_embed.python_backend.checkpoint import files

    directory = files.download(options.id, options.checkpoints)
    logging.info("%s is in %s", options.id, directory)
    return 0


def add_model(options: argparse.Namespace) -> int:
    """Add a model directory for a checkpoint to a repository.

    Raises:
        RepositoryError, ConfigError: if the name is taken, or the checkpoint cannot be downloaded or served.
    """
    target = options.model_repository.absolute()
    repository.check_path(target)
    checkpoint = _checkpoint(options.checkpoint, options.checkpoints)
    name = options.name or repository.model_name(checkpoint.title)
    repository.check_name(name, target)  # before downloading gigabytes
    for other in repository.loaded_by(checkpoint, target):
        logging.warning("%s already loads this checkpoint: each model needs its own memory", other)
    try:
        # Not inside the repository: an incomplete model directory stops tritonserver.
        if target == MODELS:
            target.parent.mkdir(parents=True, exist_ok=True)  # the user's data directory may not exist yet
        with tempfile.TemporaryDirectory(prefix="triton-embed-", dir=target.parent) as scratch:
            overrides = {"pooling": options.pooling} if options.pooling else {}
            family, model = _write(checkpoint, FAMILIES, Path(scratch), name, overrides)
            directory = repository.install(Path(scratch) / name, target)
    except OSError as error:
        raise RepositoryError(f"{target / name} cannot be written: {error.strerror or error}") from None
    sizes = "or fewer" if model.matryoshka is True else f"or one of {model.matryoshka}"
    logging.info("%s: family %s, pooling %s, up to %d tokens per text", name, family, model.pooling, model.max_tokens)
    logging.info("%d dimensions%s", model.dimensions, f", {sizes}" if model.matryoshka else "")
    logging.info("names for clients: %s", ", ".join(dict.fromkeys((name, *checkpoint.names))))
    logging.info("written to %s", directory)
    given_by_id = checkpoint.parameter == checkpoint.id
    root = options.checkpoints.absolute() if given_by_id else None
    alone, with_others = _serving_commands(name, target, root)
    logging.info("serve it alone: %s", alone)
    logging.info("or with all models of that repository: %s", with_others)
    return 0


def _serving_commands(name: str, models: Path, checkpoints: Path | None) -> tuple[str, str]:
    """Return (the command that serves this model alone, Triton's command for all models).

    Args:
        checkpoints: Directory in which config.pbtxt's checkpoint id is looked up; None if it has a path instead.
    """
    gateway = ["triton-embed", "serve", f"--model={name}"]
    gateway += [f"--model-repository={models}"] if models != FAMILIES else []
    gateway += [f"--checkpoints={checkpoints}"] if checkpoints not in (None, CHECKPOINTS) else []
    triton = shlex.join(["tritonserver", f"--model-repository={models}"])
    if checkpoints not in (None, models.parent / "checkpoints"):  # the engine's default
        triton = f"TRITON_EMBED_CHECKPOINTS={shlex.quote(str(checkpoints))} {triton}"
    return shlex.join(gateway), triton


def _repository(options: argparse.Namespace, scratch: Path) -> Path:
    """Return the repository to serve, all of it.

    It is --model-repository itself, or `scratch` with copies of models if some are selected or a parameter is
    overridden, or with a new model for --model-path.

    Raises:
        RepositoryError, ConfigError: if a model does not exist or cannot be served.
    """
    overrides = _overrides(options)
    if options.model_path is None:
        names = repository.model_names(options.model_repository)
        if not options.model and not overrides:
            return Path(options.model_repository)
        if unknown := sorted({*options.model} - {*names}):
            raise RepositoryError(f"{options.model_repository} has no model '{unknown[0]}'; it has {', '.join(names)}")
        for name in dict.fromkeys(options.model or names):
            repository.write_model(options.model_repository, name, scratch, name, overrides)
        return scratch
    if options.model:
        raise RepositoryError("--model selects from --model-repository and cannot be combined with --model-path")
    checkpoint = _checkpoint(options.model_path, options.checkpoints)
    name = repository.model_name(checkpoint.title)
    family, _ = _write(checkpoint, options.model_repository, scratch, name, overrides)
    logging.info("%s is served as %s", checkpoint.directory, family)
    return scratch


def _checkpoint(name: str, root: Path) -> Checkpoint:
    """Return the checkpoint in directory `name`, or with id `name` and its files under `root`. Download nothing yet."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        directory = directory.resolve()
        repository.check_is_ascii(directory)
        return Checkpoint(directory, str(directory), _id_of(directory, root.resolve()))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise RepositoryError(f"{name} is neither a directory nor an id like Qwen/Qwen3-Embedding-0.6B")
    return Checkpoint(root / name, name, name)


def _id_of(directory: Path, root: Path) -> str:
    """Return the Hugging Face id of <root>/<org>/<name> or of a directory in the hub's cache, else an empty string."""
    if directory.parent.parent == root:
        return f"{directory.parent.name}/{directory.name}"
    cached = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/\w+$", str(directory))
    return f"{cached[1]}/{cached[2]}" if cached else ""


def _write(
    checkpoint: Checkpoint, source: Path, target: Path, name: str, overrides: Mapping[str, str]
) -> tuple[str, "ModelConfig"]:
    """Write `target/name` for a checkpoint from the family in `source` that serves it. Download the checkpoint first.

    Returns:
        The family, and the engine's configuration of the checkpoint.

    Raises:
        RepositoryError, ConfigError: if the engine would refuse to load it.
    """
    from triton_embed.python_backend.checkpoint import files

    if checkpoint.parameter == checkpoint.id:
        files.download(checkpoint.id, checkpoint.directory.parent.parent)
    family = repository.family_of(checkpoint.directory, source, overrides.get("pooling", ""))
    repository.check_weights(checkpoint)
    files.weight_files(network_directory(checkpoint.directory))
    parameters = repository.checkpoint_parameters(checkpoint, family, source, name)
    directory = repository.write_model(source, family, target, name, {**parameters, **overrides})
    return family, _model_config(checkpoint.directory, directory)


def _model_config(checkpoint: Path, model: Path) -> "ModelConfig":
    """Return the configuration that the engine would read from a checkpoint and its model directory.

    Raises:
        ConfigError: if the checkpoint and the model directory disagree, or the engine would refuse its tokenizer or
            image processor.
    """
    from triton_embed.python_backend.checkpoint.config import ModelConfig, ServingConfig

    # model.py imports triton_python_backend_utils, which exists only inside Triton. An empty module is enough here.
    sys.modules.setdefault("triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    family = runpy.run_path(str(model / "1" / "model.py"))["TritonPythonModel"]
    declared = repository.read_config(model.parent, model.name).parameters
    parameters = {key: {"string_value": value.string_value} for key, value in declared.items()}
    config = json.dumps({"name": model.name, "parameters": parameters})
    serving = ServingConfig.from_triton({"model_config": config, "model_repository": str(model)})
    model_config = ModelConfig.from_checkpoint(checkpoint, serving, family.spec)
    if find_spec("transformers"):  # else the engine, and so the check, needs another environment
        processor = family.spec.load(family.spec.processor)
        directory, network_config = model_config.directory, model_config.network_config
        processor(directory, model_config, network_config, serving, family.spec.eos, family.prompt)
    return model_config


def _overrides(options: argparse.Namespace) -> dict[str, str]:
    """Return the parameters of config.pbtxt that flags set."""
    parameters: dict[str, str] = {}
    if options.dtype:
        parameters["dtype"] = DTYPES.get(options.dtype, options.dtype)
    if options.kernels:
        parameters["kernels"] = options.kernels
    if options.pooling:
        parameters["pooling"] = options.pooling
    if options.cache_mb:
        parameters["cache_bytes"] = str(options.cache_mb * 2**20)
    try:
        overrides = json.loads(options.json_model_override_args)
        for key, value in overrides.items():
            if key == "matryoshka_dimensions":
                parameters[key] = ",".join(str(int(size)) for size in value)
            elif key == "is_matryoshka":
                parameters[key] = str(bool(value)).lower()
            else:
                raise RepositoryError(
                    f"--json-model-override-args: '{key}' cannot be overridden; "
                    "matryoshka_dimensions and is_matryoshka can"
                )
    except (AttributeError, TypeError, json.JSONDecodeError) as error:
        raise RepositoryError(f"--json-model-override-args is not a JSON object of these keys: {error}") from None
    return parameters


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triton-embed", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="debug shows Triton's whole log")
    common.add_argument(
        "--checkpoints", type=Path, default=CHECKPOINTS, help="directory of checkpoints (default %(default)s)"
    )

    command = commands.add_parser("serve", parents=[common], help="serve embeddings until stopped")
    command.set_defaults(run=serve)
    command.add_argument("--host", help="address of the gateway (default 127.0.0.1: this machine only)")
    command.add_argument("--port", type=int, help="port of the gateway (default 30000)")
    command.add_argument(
        "--api-key",
        metavar="KEY[,KEY]",
        help="require one of these keys; TRITON_EMBED_API_KEY keeps them out of the process list",
    )
    command.add_argument(
        "--cors-origins", metavar="ORIGIN[,ORIGIN]", help="origins whose pages may read responses (CORS); * for any"
    )
    command.add_argument("--workers", type=int, metavar="N", help="gateway processes (default 1)")
    command.add_argument("--log-format", choices=LOG_FORMATS, help="json: one object per line (default text)")
    command.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="load only this model of the repository; repeatable",
    )
    command.add_argument("--model-repository", type=Path, default=FAMILIES)
    command.add_argument(
        "--model-path", metavar="DIR_OR_ID", help="serve this checkpoint: a directory, or an id to download"
    )
    _add_pooling(command)
    command.add_argument("--served-model-name", metavar="NAME", help="name of the model for clients")
    command.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16", "int8", *DTYPES))
    command.add_argument(
        "--cache-mb", type=_megabytes, metavar="N", help="memory for vectors of repeated inputs, per model (default 0)"
    )
    command.add_argument(
        "--kernels",
        choices=("auto", "reference", "torch"),
        help="auto: Triton kernels on a GPU, compiled loops on a CPU; reference (or torch): plain torch everywhere",
    )
    command.add_argument(
        "--json-model-override-args",
        metavar="JSON",
        default="{}",
        help="""as '{"matryoshka_dimensions": [128, 256]}' or '{"is_matryoshka": true}'""",
    )
    command.add_argument("--is-embedding", action="store_true", help="accepted: this server only embeds")
    command.add_argument("--chat-template", choices=CHAT_TEMPLATES, help="accepted: each family has its template")
    command.add_argument(
        "--trust-remote-code", action=_NoRemoteCode, help="accepted without effect: no remote code is run"
    )
    for service, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        help_text = "0: Triton does not serve HTTP" if service == "http" else None
        command.add_argument(f"--triton-{service}-port", type=int, default=port, metavar="PORT", help=help_text)

    command = commands.add_parser("download", parents=[common], help="fetch a checkpoint from the Hugging Face hub")
    command.set_defaults(run=download)
    command.add_argument("id", metavar="ORG/NAME")

    command = commands.add_parser("add-model", parents=[common], help="add a checkpoint to a model repository")
    command.set_defaults(run=add_model)
    command.add_argument("checkpoint", metavar="ID_OR_DIR", help="a directory, or an id to download")
    _add_pooling(command)
    command.add_argument("--name", help="name of the new model (default: from the checkpoint)")
    command.add_argument("--model-repository", type=Path, default=MODELS, metavar="DIR", help="repository to write to")

    command = commands.add_parser("verify", parents=[common], help="check a model against its card and transformers")
    command.set_defaults(run=verify.run)
    verify.add_arguments(command)
    return parser


def _add_pooling(command: argparse.ArgumentParser) -> None:
    choices = sorted(set(repository.POOLING.values()))
    command.add_argument("--pooling", choices=choices, help="for a checkpoint that says nothing of pooling")


def _megabytes(text: str) -> int:
    """Parse a size; argparse turns the error into its message."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of megabytes, got {text!r}")
    return int(text)


class _NoRemoteCode(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stderr.write("--trust-remote-code: no remote code is run; the families are built in\n")


if __name__ == "__main__":
    main()
