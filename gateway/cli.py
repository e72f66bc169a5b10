"""`triton-embed`: serve models, fetch and add checkpoints. Where the gateway and the engine's files meet."""

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
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from triton_embed.gateway import logs, repository, verify
from triton_embed.gateway.repository import Checkpoint, RepositoryError
from triton_embed.python_backend.errors import ConfigError

if TYPE_CHECKING:
    from triton_embed.python_backend.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent  # the checkout: this package is installed in place
MODELS = ROOT / "model_repository"
CHECKPOINTS = ROOT / "checkpoints"
CHAT_TEMPLATES = ("gme-qwen2-vl",)
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
# What people type for --dtype -> config.pbtxt's word.
DTYPES = {"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 0: stopped as asked; 1: it failed, with one sentence; 2: the command line is wrong."""
    options = _parser().parse_args(arguments)
    logs.configure(options.log_level)
    try:
        sys.exit(options.run(options))
    except (RepositoryError, ConfigError) as error:
        sys.exit(f"triton-embed: {error}")


def serve(options: argparse.Namespace) -> int:
    """Run tritonserver and the gateway until stopped."""
    from triton_embed.gateway.settings import SettingsError, read_settings

    names = ("host", "port", "api_key", "served_model_name", "workers", "log_format", "cors_origins")
    stated = {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        settings = read_settings(log_level=options.log_level, **stated)
    except SettingsError as error:
        sys.exit(f"triton-embed: {error}")
    logs.configure(settings.log_level, settings.log_format)
    with tempfile.TemporaryDirectory(prefix="triton-embed-") as scratch:
        source, models = _models(options, Path(scratch))
        repository.check_place(source)
        # After what can be refused at once: these imports take a second.
        import uvloop

        from triton_embed.gateway.supervisor import ServeError, Supervisor
        from triton_embed.gateway.triton_process import TritonOptions

        triton = TritonOptions(
            repository=source,
            models=models,
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
    """Fetch a checkpoint into checkpoints/<org>/<name>."""
    from triton_embed.python_backend import checkpoint

    directory = checkpoint.download(options.id, options.checkpoints)
    logging.info("%s is in %s", options.id, directory)
    return 0


def add_model(options: argparse.Namespace) -> int:
    """Write a model directory for a checkpoint into a repository, where every later start finds it."""
    target = options.model_repository.absolute()
    repository.check_place(target)
    checkpoint = _checkpoint(options.checkpoint, options.checkpoints)
    name = options.name or repository.model_name(checkpoint.title)
    repository.check_name(name, target)  # before gigabytes are downloaded
    for other in repository.loaded_by(checkpoint, target):
        logging.warning("%s loads this checkpoint already: each needs memory of its own", other)
    try:
        # Not inside: a directory that is no whole model stops tritonserver.
        with tempfile.TemporaryDirectory(prefix="triton-embed-", dir=target.parent) as scratch:
            family, model = _write(checkpoint, MODELS, Path(scratch), name, {})
            directory = repository.install(Path(scratch) / name, target)
    except OSError as error:
        raise RepositoryError(f"{target / name} cannot be written: {error.strerror or error}") from None
    sizes = "or any smaller size" if model.matryoshka is True else f"or one of {model.matryoshka}"
    logging.info("%s: family %s, pooling %s, %d tokens of a text", name, family, model.pooling, model.max_tokens)
    logging.info("%d dimensions%s", model.dimensions, f", {sizes}" if model.matryoshka else "")
    logging.info("clients call it %s", ", ".join(dict.fromkeys((name, *checkpoint.names))))
    logging.info("written to %s", directory)
    root = options.checkpoints.absolute() if checkpoint.stated == checkpoint.id else None
    alone, among_all = _serving_commands(name, target, root)
    logging.info("serve it alone: %s", alone)
    logging.info("or with all models there: %s", among_all)
    return 0


def _serving_commands(name: str, models: Path, checkpoints: Path | None) -> tuple[str, str]:
    """(the command that serves this model alone, Triton's own for all); `checkpoints` is where its id is looked up."""
    gateway = ["triton-embed", "serve", f"--model={name}"]
    gateway += [f"--model-repository={models}"] if models != MODELS else []
    gateway += [f"--checkpoints={checkpoints}"] if checkpoints not in (None, CHECKPOINTS) else []
    triton = shlex.join(["tritonserver", f"--model-repository={models}"])
    if checkpoints not in (None, models.parent / "checkpoints"):  # where the engine looks by itself
        triton = f"TRITON_EMBED_CHECKPOINTS={shlex.quote(str(checkpoints))} {triton}"
    return shlex.join(gateway), triton


def _models(options: argparse.Namespace, scratch: Path) -> tuple[Path, tuple[str, ...]]:
    """(repository, models to load): the checked-in repository, or a generated one where something is overridden."""
    overrides = _overrides(options)
    if options.model_path is None and not overrides:
        return options.model_repository, tuple(options.model) or ("*",)
    if options.model_path is None:
        names = options.model or repository.families(options.model_repository)
        for name in names:
            repository.write_model(options.model_repository, name, scratch, name, overrides)
        return scratch, tuple(names)
    if options.model:
        raise RepositoryError("--model names models of --model-repository; with --model-path it has no meaning")
    checkpoint = _checkpoint(options.model_path, options.checkpoints)
    name = repository.model_name(checkpoint.title)
    family, _ = _write(checkpoint, options.model_repository, scratch, name, overrides)
    logging.info("%s is served as %s", checkpoint.directory, family)
    return scratch, (name,)


def _checkpoint(given: str, root: Path) -> Checkpoint:
    """A directory anywhere, else an id, whose files belong under `root`; nothing is downloaded yet."""
    directory = Path(given).expanduser()
    if directory.is_dir():
        directory = directory.resolve()
        return Checkpoint(directory, str(directory), _id_of(directory, root.resolve()))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        raise RepositoryError(f"{given} is neither a directory nor an id like Qwen/Qwen3-Embedding-0.6B")
    return Checkpoint(root / given, given, given)


def _id_of(directory: Path, root: Path) -> str:
    """The Hugging Face id that a place tells: <root>/<org>/<name>, or the hub's own cache; empty for any other."""
    if directory.parent.parent == root:
        return f"{directory.parent.name}/{directory.name}"
    cached = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/\w+$", str(directory))
    return f"{cached[1]}/{cached[2]}" if cached else ""


def _write(
    checkpoint: Checkpoint, source: Path, target: Path, name: str, overrides: Mapping[str, str]
) -> tuple[str, "ModelConfig"]:
    """Write `target/name` from the family in `source` that serves a checkpoint, downloaded if it has to be.

    Returns the family, and what the engine will read in the checkpoint. RepositoryError or ConfigError: it will not
    load it.
    """
    from triton_embed.python_backend import checkpoint as files

    if checkpoint.stated == checkpoint.id:
        files.download(checkpoint.id, checkpoint.directory.parent.parent)
    family = repository.family_of(checkpoint.directory, source)
    repository.check_weights(checkpoint)
    files.weight_files(checkpoint.directory)
    parameters = repository.facts(checkpoint, family, source, name)
    made = repository.write_model(source, family, target, name, {**parameters, **overrides})
    return family, _engine_reads(checkpoint.directory, made)


def _engine_reads(checkpoint: Path, made: Path) -> "ModelConfig":
    """What the engine reads in a checkpoint by a model directory. ConfigError: the two do not agree."""
    from triton_embed.python_backend.config import ModelConfig, ServingConfig

    # The family's file leads to the one that imports it. Only inside Triton is there any; nothing of it is used here.
    sys.modules.setdefault("triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    family = runpy.run_path(str(made / "1" / "model.py"))["TritonPythonModel"]
    stated = repository.read_config(made.parent, made.name).parameters
    parameters = {key: {"string_value": value.string_value} for key, value in stated.items()}
    config = json.dumps({"name": made.name, "parameters": parameters})
    serving = ServingConfig.from_triton({"model_config": config, "model_repository": str(made)})
    return ModelConfig.from_checkpoint(checkpoint, serving, family.spec)


def _overrides(options: argparse.Namespace) -> dict[str, str]:
    """config.pbtxt parameters that flags set."""
    parameters: dict[str, str] = {}
    if options.dtype:
        parameters["dtype"] = DTYPES.get(options.dtype, options.dtype)
    if options.kernels:
        parameters["kernels"] = options.kernels
    if options.cache_mb:
        parameters["cache_bytes"] = str(options.cache_mb * 2**20)
    try:
        stated = json.loads(options.json_model_override_args)
        for key, value in stated.items():
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
        raise RepositoryError(f"--json-model-override-args is not a JSON object of them: {error}") from None
    return parameters


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triton-embed", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="debug shows Triton's whole log")
    common.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="where checkpoints are kept")

    command = commands.add_parser("serve", parents=[common], help="serve embeddings until stopped")
    command.set_defaults(run=serve)
    command.add_argument("--host", help="address of the gateway (default 127.0.0.1: this machine only)")
    command.add_argument("--port", type=int, help="port of the gateway (default 30000)")
    command.add_argument(
        "--api-key",
        metavar="KEY[,KEY]",
        help="ask clients for one of these keys; in TRITON_EMBED_API_KEY they stay out of the process list",
    )
    command.add_argument("--cors-origins", metavar="ORIGIN[,ORIGIN]", help="whose pages may read answers; * for any")
    command.add_argument("--workers", type=int, metavar="N", help="processes of the gateway (default 1)")
    command.add_argument("--log-format", choices=LOG_FORMATS, help="json: one object a line (default text)")
    command.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="load only this model of the repository; repeatable",
    )
    command.add_argument("--model-repository", type=Path, default=MODELS)
    command.add_argument(
        "--model-path", metavar="DIR_OR_ID", help="serve this checkpoint: a directory, or an id to download"
    )
    command.add_argument("--served-model-name", metavar="NAME", help="what clients call the model")
    command.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16", "int8", *DTYPES))
    command.add_argument(
        "--cache-mb", type=int, metavar="N", help="vectors kept for inputs that come again, of each model (default 0)"
    )
    command.add_argument(
        "--kernels", choices=("auto", "torch"), help="auto: Triton kernels on a GPU; torch: none anywhere"
    )
    command.add_argument(
        "--json-model-override-args",
        metavar="JSON",
        default="{}",
        help="""as '{"matryoshka_dimensions": [128, 256]}' or '{"is_matryoshka": true}'""",
    )
    command.add_argument("--is-embedding", action="store_true", help="accepted: it is all this server does")
    command.add_argument("--chat-template", choices=CHAT_TEMPLATES, help="accepted: the family knows its own template")
    command.add_argument(
        "--trust-remote-code", action=_NoRemoteCode, help="accepted, and without effect: no remote code is ever run"
    )
    for service, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        command.add_argument(f"--triton-{service}-port", type=int, default=port, metavar="PORT")

    command = commands.add_parser("download", parents=[common], help="fetch a checkpoint from the Hugging Face hub")
    command.set_defaults(run=download)
    command.add_argument("id", metavar="ORG/NAME")

    command = commands.add_parser("add-model", parents=[common], help="add a checkpoint to a model repository")
    command.set_defaults(run=add_model)
    command.add_argument("checkpoint", metavar="ID_OR_DIR", help="a directory, or an id to download")
    command.add_argument("--name", help="of the new model (default: after the checkpoint)")
    command.add_argument("--model-repository", type=Path, default=MODELS, metavar="DIR", help="where it is written")

    command = commands.add_parser("verify", parents=[common], help="check a model against its card and transformers")
    command.set_defaults(run=verify.run)
    verify.add_arguments(command)
    return parser


class _NoRemoteCode(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stderr.write("--trust-remote-code: no remote code is ever run; the families are built in\n")


if __name__ == "__main__":
    main()
