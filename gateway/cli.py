"""`triton-embed`: serve models, fetch checkpoints. The one place where the gateway and the engine's files meet."""

import argparse
import asyncio
import json
import logging
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from triton_embed.gateway import repository
from triton_embed.gateway.repository import RepositoryError
from triton_embed.python_backend.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent  # the checkout: this package is installed in place
CHAT_TEMPLATES = ("gme-qwen2-vl",)
LOG_LEVELS = ("debug", "info", "warning", "error")
# What people type for --dtype -> config.pbtxt's word.
DTYPES = {"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 0: stopped as asked; 1: it failed, with one sentence; 2: the command line is wrong."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    # Not ours, and only of interest to someone who debugs.
    for name in ("httpx", "httpcore", "huggingface_hub", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        sys.exit(options.run(options))
    except (RepositoryError, ConfigError) as error:
        sys.exit(f"triton-embed: {error}")


def serve(options: argparse.Namespace) -> int:
    """Run tritonserver and the gateway until stopped."""
    with tempfile.TemporaryDirectory(prefix="triton-embed-") as scratch:
        source, models = _models(options, Path(scratch))
        # After what can be refused at once: these imports take a second.
        import uvloop

        from triton_embed.gateway.settings import SettingsError, read_settings
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
        stated = {
            "host": options.host,
            "port": options.port,
            "api_key": options.api_key,
            "served_model_name": options.served_model_name,
        }
        try:
            settings = read_settings(
                triton_grpc=f"{triton.address}:{triton.grpc_port}",
                triton_repository_header=triton.repository_header,
                log_level=options.log_level,
                **{key: value for key, value in stated.items() if value is not None},
            )
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
    directory, checkpoint = _checkpoint(options.model_path, options.checkpoints)
    family = repository.family_of(directory, options.model_repository)
    logging.info("%s is served as %s", directory, family)
    name = re.sub(r"[^\w.-]", "-", directory.name)
    repository.write_model(options.model_repository, family, scratch, name, {**overrides, "checkpoint": checkpoint})
    return scratch, (name,)


def _checkpoint(path: str, root: Path) -> tuple[Path, str]:
    """(directory, config.pbtxt's checkpoint) of --model-path: a directory anywhere, else an id to download."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory.resolve(), str(directory.resolve())
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise RepositoryError(f"--model-path {path} is neither a directory nor an id like Qwen/Qwen3-Embedding-0.6B")
    from triton_embed.python_backend import checkpoint

    return checkpoint.download(path, root), path


def _overrides(options: argparse.Namespace) -> dict[str, str]:
    """config.pbtxt parameters that flags set."""
    parameters: dict[str, str] = {}
    if options.dtype:
        parameters["dtype"] = DTYPES.get(options.dtype, options.dtype)
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
    common.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints", help="where checkpoints are kept")

    command = commands.add_parser("serve", parents=[common], help="serve embeddings until stopped")
    command.set_defaults(run=serve)
    command.add_argument("--host", help="address of the gateway (default 127.0.0.1: this machine only)")
    command.add_argument("--port", type=int, help="port of the gateway (default 30000)")
    command.add_argument("--api-key", help="ask clients for this key (default: none)")
    command.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="load only this model of the repository; repeatable",
    )
    command.add_argument("--model-repository", type=Path, default=ROOT / "model_repository")
    command.add_argument(
        "--model-path", metavar="DIR_OR_ID", help="serve this checkpoint: a directory, or an id to download"
    )
    command.add_argument("--served-model-name", metavar="NAME", help="what clients call the model")
    command.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16", *DTYPES))
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
    return parser


class _NoRemoteCode(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stderr.write("--trust-remote-code: no remote code is ever run; the families are built in\n")


if __name__ == "__main__":
    main()
