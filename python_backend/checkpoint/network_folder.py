"""The folder of a checkpoint that holds its network, which sentence-transformers' modules.json may name."""

from pathlib import Path

from triton_embed.python_backend.checkpoint.json_file import read_json


def network_directory(directory: Path) -> Path:
    """Return the directory of a checkpoint's config.json, weights and tokenizer: itself or a sub-folder."""
    first = next(iter(read_json(directory / "modules.json", list)), None)
    if not isinstance(first, dict) or str(first.get("type")).endswith((".Pooling", ".Dense", ".Normalize")):
        return directory
    return directory / str(first.get("path", ""))
