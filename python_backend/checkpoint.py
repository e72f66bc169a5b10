"""Find, download and check the files of a checkpoint."""

from importlib.util import find_spec
from pathlib import Path

from triton_embed.python_backend.config import ServingConfig
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.json_file import read_json

# What is needed to serve: never pickles (*.bin, *.pt), never code.
WANTED_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


def directory_of(checkpoint: str, root: Path) -> Path:
    """Where a checkpoint belongs: <root>/<org>/<name> for a Hugging Face id, itself for an absolute directory."""
    return root / checkpoint  # pathlib: an absolute right side wins


def locate(serving: ServingConfig) -> Path | None:
    """The checkpoint's directory, or None where there is none: under the root first, then a Python package."""
    directory = directory_of(serving.checkpoint, serving.checkpoint_root)
    if (directory / "config.json").is_file():
        return directory
    if serving.checkpoint_package:
        package = find_spec(serving.checkpoint_package)
        if package and package.origin:
            return Path(package.origin).parent / "model"
    if directory.is_dir():
        raise ConfigError(f"{directory} holds no config.json")
    return None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files, sharded or single. ConfigError: none, or a shard that the index names is missing."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{directory} holds no *.safetensors file")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index, dict).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{index} has no weight_map")
        named = {directory / name for name in weight_map.values()}
        if missing := sorted(str(path) for path in named if not path.is_file()):
            raise ConfigError(f"{index} names {missing[0]}, which is missing")
        return sorted(named)
    return [directory / "model.safetensors"] if directory / "model.safetensors" in files else files


def download(repo_id: str, root: Path) -> Path:
    """Fetch a checkpoint from the Hugging Face hub into <root>/<org>/<name>; resumes, shows progress.

    Reads HF_ENDPOINT and HF_TOKEN as huggingface_hub does. ConfigError: the hub refuses or is out of reach.
    """
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    directory = directory_of(repo_id, root)
    try:
        snapshot_download(repo_id, local_dir=directory, allow_patterns=list(WANTED_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot download {repo_id}: {reason}") from error
    return directory
