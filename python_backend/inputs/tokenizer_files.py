"""A checkpoint's tokenizer, loaded by transformers and cached, because its import takes a third of a model's start."""

import hashlib
import logging
import os
import tempfile
from importlib import metadata
from pathlib import Path

from tokenizers import Tokenizer, normalizers

from triton_embed.python_backend.checkpoint.git_lfs import is_pointer
from triton_embed.python_backend.checkpoint.json_file import JsonFile
from triton_embed.python_backend.errors import ConfigError

log = logging.getLogger(__name__)

_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")  # a checkpoint has one of these at least
_MAX_BYTES = 2**26  # larger files are weights
_CACHE_VERSION = 2  # of the checks that a tokenizer passes before it is cached; older ones let empty tokenizers through


def load(directory: Path, lowercase: bool) -> tuple[Tokenizer, str]:
    """Load the tokenizer as transformers does, without remote code and without padding and truncation.

    Returns:
        The tokenizer, and the side on which tokenizer.json or tokenizer_config.json cuts long texts: right or left.

    Args:
        lowercase: Whether texts are lowercased before anything else. As in sentence-transformers 6, special tokens that
            are typed in a text are not.

    Raises:
        ConfigError: There is none, or transformers cannot load it.
    """
    # Without any file, transformers would make up an empty tokenizer.
    if not any(next(directory.glob(pattern), None) for pattern in _FILES):
        raise ConfigError(f"{directory} has no tokenizer: none of {', '.join(_FILES)}")
    tokenizer = _load_cached(directory)
    config = JsonFile(directory / "tokenizer_config.json")
    side = config.get("truncation_side", str, (tokenizer.truncation or {}).get("direction", "right"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    normalizer = tokenizer.normalizer
    if lowercase and (normalizer is None or normalizer.normalize_str("A") != "a"):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([normalizer] if normalizer else [])])
    return tokenizer, side


def is_stored(token: str, directory: Path, config: JsonFile, tokenizer: Tokenizer) -> bool:
    """Return whether the checkpoint has a token: transformers adds one that is only named, which is untrained."""
    file = directory / "tokenizer.json"
    if file.is_file():
        has_token = Tokenizer.from_file(str(file)).token_to_id(token) is not None
    else:  # a vocab.json does not have the special tokens: their ids follow its last
        has_token = token in tokenizer.get_vocab(with_added_tokens=False) or (directory / "vocab.json").is_file()
    added = [entry.get("content") for entry in config.get("added_tokens_decoder", dict, {}).values()]
    return has_token or token in added or token in JsonFile(directory / "added_tokens.json").values


def _load_cached(directory: Path) -> Tokenizer:
    try:
        file = _cache_file(directory)
    except RuntimeError:  # this user has no home directory
        return _load_with_transformers(directory)
    if file.is_file():
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - tokenizers raises no narrower type
            log.warning("Cannot read the cached tokenizer %s: %s", file, error)
    tokenizer = _load_with_transformers(directory)
    if not tokenizer.encode_special_tokens:  # which is not saved
        _save(tokenizer, file)
    return tokenizer


def _load_with_transformers(directory: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # not at the top: the import takes longer than all others but torch's

    try:
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokenizer: Tokenizer = loaded.backend_tokenizer
    except Exception as error:
        for path in (path for pattern in _FILES for path in directory.glob(pattern)):
            if is_pointer(path):
                raise ConfigError(f"{path} is a git-lfs pointer, not the file: run git lfs pull") from None
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{directory}: transformers cannot load the tokenizer: {reason}") from error
    names = loaded.vocab_files_names.values()
    if not any((directory / name).is_file() for name in names):  # then transformers has made up an empty tokenizer
        raise ConfigError(
            f"{directory} has none of {', '.join(sorted(names))}, the files of its tokenizer class "
            f"{type(loaded).__name__}; correct tokenizer_class in tokenizer_config.json, or add one of them"
        )
    return tokenizer


def _cache_file(directory: Path) -> Path:
    """Return the file of the cache, named after a hash of all that transformers may read and of its version."""
    digest = hashlib.sha256(f"cache {_CACHE_VERSION}\n".encode())
    for package in ("transformers", "tokenizers"):
        digest.update(f"{package} {metadata.version(package)}\n".encode())
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.stat().st_size <= _MAX_BYTES:
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode())
            digest.update(content)
    return Path.home() / ".cache" / "triton-embed" / "tokenizers" / f"{digest.hexdigest()}.json"


def _save(tokenizer: Tokenizer, file: Path) -> None:
    """Write the file in one step, because other models may read it at the same time."""
    try:
        content = tokenizer.to_str()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, encoding="utf-8", delete=False) as part:
            part.write(content)
        os.replace(part.name, file)
    except Exception as error:  # noqa: BLE001 - a tokenizer with parts in Python cannot be saved, nor any on a full disk
        log.info("Cannot cache the tokenizer for the next start: %s", error)
