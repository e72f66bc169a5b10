"""safetensors -> parameters: driven by what the network needs, strict both ways."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from triton_embed.python_backend.checkpoint import weight_files
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.layers import FusedLinear


@dataclass(frozen=True)
class Naming:
    """How a network's parameters relate to a checkpoint's tensors.

    `renames`: what a checkpoint may call the beginnings of names, and what the network calls them; the first that
    fits counts. `fused`: the module that holds, one below the other, the tensors of these siblings. `ignored`:
    beginnings of names (as in the network) that it has no use for; `ignored_endings`: endings.
    """

    renames: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    ignored_endings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: opened anew each time, so that no more of a file is mapped than the tensor being read, and
    copied once, to the place and dtype it is for."""

    path: Path
    key: str

    def copy_to(self, place: Tensor, name: str) -> None:
        """ConfigError: it has another shape than `place`."""
        with safe_open(self.path, framework="pt") as file:
            tensor = file.get_tensor(self.key)
            if tensor.shape != place.shape:
                found, wanted = list(tensor.shape), list(place.shape)
                raise ConfigError(f"{self.path}: tensor '{name}' has shape {found}, config.json asks for {wanted}")
            place.copy_(tensor)


def load(network: nn.Module, naming: Naming, directory: Path, dtype: torch.dtype, device: str) -> None:
    """Give every parameter of `network` (built on meta) its tensor, in `dtype` on `device`; a module with a `dtype`
    of its own keeps that one.

    ConfigError: a tensor that is missing, left over or of another shape, or a file that cannot be read; it names it.
    """
    tensors = _index(directory, naming)
    for name, parameter in list(network.named_parameters()):
        module, _, attribute = name.rpartition(".")
        owner = network.get_submodule(module)
        names = _parts(name, naming.fused)
        sizes = list(owner.sizes) if isinstance(owner, FusedLinear) else list(parameter.shape[:1])
        value = torch.empty(parameter.shape, dtype=getattr(owner, "dtype", dtype), device=device)
        for part, place in zip(names, torch.split(value, sizes), strict=True):
            if part not in tensors:
                raise ConfigError(f"{directory}: tensor '{part}' is missing")
            tensors.pop(part).copy_to(place, part)
        setattr(owner, attribute, nn.Parameter(value, requires_grad=False))

    unknown = [
        name for name in tensors if not name.startswith(naming.ignored) and not name.endswith(naming.ignored_endings)
    ]
    if unknown:
        name = min(unknown)
        raise ConfigError(
            f"{tensors[name].path}: tensor '{name}' is not part of this network ({len(unknown)} left over)"
        )


def _index(directory: Path, naming: Naming) -> dict[str, _Stored]:
    """Our name of each stored tensor -> where it is."""
    tensors: dict[str, _Stored] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        for key in keys:
            name = _rename(key, naming.renames)
            if name in tensors:
                raise ConfigError(f"{path}: tensors '{tensors[name].key}' and '{key}' have one place, '{name}'")
            tensors[name] = _Stored(path, key)
    return tensors


def _rename(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in renames:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _parts(name: str, fused: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The checkpoint's names for a parameter: one, or those its fused module was made of."""
    module, _, attribute = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    before = f"{parent}." if parent else ""
    return [f"{before}{source}.{attribute}" for source in fused[last]] if last in fused else [name]
