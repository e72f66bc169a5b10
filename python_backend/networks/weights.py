"""Loading of safetensors into parameters: driven by what the network needs, and strict in both directions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from triton_embed.python_backend.checkpoint.files import weight_files
from triton_embed.python_backend.checkpoint.git_lfs import is_pointer
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.networks.layers import FusedLinear


@dataclass(frozen=True)
class Naming:
    """The relation of a network's parameters to a checkpoint's tensors.

    Attributes:
        renames: (prefix in the checkpoint, prefix in the network); the first that matches is applied.
        fused: A module -> the sibling modules in the checkpoint whose tensors it holds, concatenated.
        ignored: Prefixes of names (as in the network) that are not loaded.
        ignored_endings: Suffixes of names that are not loaded.
    """

    renames: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    ignored_endings: tuple[str, ...] = ()


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Names before transformers 2, which transformers still renames.
_OLD_ENDINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Endings of tensors that quantization adds. The names belong to its common formats.
_QUANTIZED_ENDINGS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or INT8",
    ".weight_scale_inv": "FP8",
    ".SCB": "bitsandbytes INT8",
    ".absmax": "bitsandbytes 4-bit",
}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file.

    The file is opened for each tensor, so that at most one tensor is mapped at a time. A tensor is copied once, to its
    final memory and dtype.
    """

    path: Path
    key: str

    def copy_to(self, target: Tensor, name: str) -> None:
        """Copy the tensor.

        Raises:
            ConfigError: Its shape is not that of `target`, or its numbers are quantized: they mean nothing without
                scales.
        """
        with safe_open(self.path, framework="pt") as file:
            tensor = file.get_tensor(self.key)
            if tensor.dtype not in _FLOATS:
                raise ConfigError(
                    f"{self.path}: tensor '{name}' is {str(tensor.dtype).removeprefix('torch.')}; quantized weights "
                    "are not implemented: serve the original checkpoint, with dtype int8 if that is wanted"
                )
            if tensor.shape != target.shape:
                actual, expected = list(tensor.shape), list(target.shape)
                raise ConfigError(f"{self.path}: tensor '{name}' has shape {actual}, config.json requires {expected}")
            target.copy_(tensor)


def load(network: nn.Module, naming: Naming, directory: Path, dtype: torch.dtype, device: str) -> None:
    """Load every parameter of `network`, which was built on the meta device, in `dtype` on `device`.

    A module with a `dtype` attribute keeps that dtype.

    Raises:
        ConfigError: A tensor is missing, unexpected or of another shape, or a file cannot be read.
    """
    tensors = _index(directory, naming)
    _refuse_derived(tensors)
    for name, parameter in list(network.named_parameters()):
        module, _, attribute = name.rpartition(".")
        owner = network.get_submodule(module)
        names = _parts(name, naming.fused)
        sizes = list(owner.sizes) if isinstance(owner, FusedLinear) else list(parameter.shape[:1])
        value = torch.empty(parameter.shape, dtype=getattr(owner, "dtype", dtype), device=device)
        for part, target in zip(names, torch.split(value, sizes), strict=True):
            if part not in tensors:
                raise ConfigError(f"{directory}: tensor '{part}' is missing")
            tensors.pop(part).copy_to(target, part)
        setattr(owner, attribute, nn.Parameter(value, requires_grad=False))

    unknown = [
        name for name in tensors if not name.startswith(naming.ignored) and not name.endswith(naming.ignored_endings)
    ]
    if unknown:
        name = min(unknown)
        raise ConfigError(
            f"{tensors[name].path}: tensor '{name}' is not part of this network ({len(unknown)} unexpected tensors)"
        )


def _index(directory: Path, naming: Naming) -> dict[str, _Stored]:
    """Return the stored tensors by the network's names."""
    tensors: dict[str, _Stored] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
        except (SafetensorError, OSError) as error:
            if is_pointer(path):
                raise ConfigError(f"{path} is a git-lfs pointer, not the weights: run git lfs pull") from None
            raise ConfigError(f"{path} cannot be read: {error}") from error
        for key in keys:
            name = _rename(key, naming.renames)
            if name in tensors:
                raise ConfigError(f"{path}: tensors '{tensors[name].key}' and '{key}' both map to '{name}'")
            tensors[name] = _Stored(path, key)
    return tensors


def _refuse_derived(tensors: Mapping[str, _Stored]) -> None:
    """Refuse weights that are quantized, or next to an adapter that is not merged into them."""
    for name, stored in tensors.items():
        if ".lora_A." in name or ".base_layer." in name:
            raise ConfigError(
                f"{stored.path}: tensor '{name}' belongs to an adapter that is not merged; merge it with "
                "merge_and_unload() of peft and save the result"
            )
        for ending, formats in _QUANTIZED_ENDINGS.items():
            if name.endswith(ending):
                raise ConfigError(
                    f"{stored.path}: tensor '{name}' belongs to weights quantized as {formats}, which are not "
                    "implemented: serve the original checkpoint, with dtype int8 if that is wanted"
                )


def _rename(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for old, new in _OLD_ENDINGS.items():
        if key.endswith(old):
            key = key.removesuffix(old) + new
    for stored, renamed in renames:
        if key.startswith(stored):
            return renamed + key.removeprefix(stored)
    return key


def _parts(name: str, fused: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the checkpoint's names of a parameter: one, or those of the modules it fuses."""
    module, _, attribute = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    prefix = f"{parent}." if parent else ""
    return [f"{prefix}{source}.{attribute}" for source in fused[last]] if last in fused else [name]
