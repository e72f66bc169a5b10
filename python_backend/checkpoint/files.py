"""Find, download and check the files of a checkpoint."""

import os
import shlex
from importlib.util import find_spec
from pathlib import Path

from triton_embed.python_backend.checkpoint.config import ServingConfig
from triton_embed.python_backend.checkpoint.json_file import read_json
from triton_embed.python_backend.errors import ConfigError

# Files needed to serve: no pickles (*.bin, *.pt) and no code.
DOWNLOADED_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


def directory_of(checkpoint: str, root: Path) -> Path:
    """Return the directory of a checkpoint: <root>/<org>/<name> for a Hugging Face id, or an absolute directory."""
    return root / checkpoint  # pathlib: an absolute right side wins


def is_checkpoint(directory: Path) -> bool:
    """Return whether a directory has a checkpoint, whose network may be in a sub-folder, or an adapter."""
    return any((directory / name).is_file() for name in ("config.json", "modules.json", "adapter_config.json"))


def locate(serving: ServingConfig) -> Path | None:
    """Return the directory of the checkpoint: under the root, else in its Python package, else None.

    Raises:
        ConfigError: The directory under the root has no config.json, or this Python, in Triton's stub, cannot encode
            its path.
    """
    directory = directory_of(serving.checkpoint, serving.checkpoint_root)
    try:
        os.fsencode(directory)
    except UnicodeEncodeError:
        raise ConfigError(
            f"{directory}: Triton's Python backend opens paths in ASCII only; move it, or name a link to it"
        ) from None
    if is_checkpoint(directory):
        return directory
    if serving.checkpoint_package:
        package = find_spec(serving.checkpoint_package)
        if package and package.origin:
            return Path(package.origin).parent / "model"
    if directory.is_dir():
        raise ConfigError(f"{directory} has no config.json")
    return None


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files: model.safetensors, else those of the index, else all.

    Raises:
        ConfigError: There is none, or a shard named in the index is missing. If there is a pickle, the message has the
            command that converts it.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickled = directory / "pytorch_model.bin"
        convert = (
            "import torch; from safetensors.torch import save_file; "
            f"tensors = torch.load({str(pickled)!r}, weights_only=True); "
            "save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, "
            f"{str(directory / 'model.safetensors')!r})"
        )
        advice = ", and pickles are never loaded. If you trust it, convert it once: "
        advice += shlex.join(["python", "-c", convert])
        raise ConfigError(f"{directory} has no *.safetensors file{advice if pickled.is_file() else ''}")
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single in files:
        return [single]
    if index.is_file():
        weight_map = read_json(index, dict).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{index} has no weight_map")
        shards = {directory / name for name in weight_map.values()}
        if missing := sorted(str(path) for path in shards if not path.is_file()):
            raise ConfigError(f"{index} names {missing[0]}, which is missing")
        return sorted(shards)
    return files


def download(repo_id: str, root: Path) -> Path:
    """Download a checkpoint from the Hugging Face hub into <root>/<org>/<name>. Resumes, and shows progress.

    HF_ENDPOINT and HF_TOKEN apply as in huggingface_hub.

    Raises:
        ConfigError: The hub refuses the download or cannot be reached.
    """
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    directory = directory_of(repo_id, root)
    try:
        snapshot_download(repo_id, local_dir=directory, allow_patterns=list(DOWNLOADED_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot download {repo_id}: {reason}") from error
    return directory
