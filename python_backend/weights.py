"""safetensors -> parameters: driven by what the network needs, strict both ways."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from triton_embed.python_backend.checkpoint import weight_files
from triton_embed.python_backend.errors import ConfigError


def load(
    network: nn.Module,
    directory: Path,
    *,
    prefixes: tuple[str, ...],
    fused: Mapping[str, tuple[str, ...]],
    ignored: tuple[str, ...],
    dtype: torch.dtype,
    device: str,
) -> None:
    """Give every parameter of `network` (built on meta) its tensor, in `dtype` on `device`.

    `prefixes`: what a checkpoint may put before every name (`bert.`). `fused`: the module that holds, along
    dimension 0, the concatenation of these siblings, all of one size. `ignored`: beginnings of names that the network
    has no use for.
    ConfigError: a tensor that is missing, left over or of another shape, or a file that cannot be read; it names it.
    """
    with ExitStack() as stack:
        tensors: dict[str, tuple[Any, str, Path]] = {}  # our name -> (open file, name in the file, file)
        for path in weight_files(directory):
            try:
                handle = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path} cannot be read: {error}") from error
            for key in handle.keys():  # noqa: SIM118 - not a mapping
                name = next((key.removeprefix(p) for p in prefixes if key.startswith(p)), key)
                if name in tensors:
                    raise ConfigError(f"{path}: tensors '{tensors[name][1]}' and '{key}' have one place, '{name}'")
                tensors[name] = (handle, key, path)

        for name, parameter in list(network.named_parameters()):
            names = _parts(name, fused)
            shape = [parameter.shape[0] // len(names), *parameter.shape[1:]]
            parts = []
            for part in names:
                if part not in tensors:
                    raise ConfigError(f"{directory}: tensor '{part}' is missing")
                handle, key, path = tensors.pop(part)
                parts.append(handle.get_tensor(key))
                if (found := list(parts[-1].shape)) != shape:
                    raise ConfigError(f"{path}: tensor '{part}' has shape {found}, config.json asks for {shape}")
            owner, _, attribute = name.rpartition(".")
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            value = nn.Parameter(whole.to(device=device, dtype=dtype), requires_grad=False)
            setattr(network.get_submodule(owner), attribute, value)

        if left := sorted(name for name in tensors if not name.startswith(ignored)):
            raise ConfigError(
                f"{tensors[left[0]][2]}: tensor '{left[0]}' is not part of this network ({len(left)} left over)"
            )


def _parts(name: str, fused: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The checkpoint's names for a parameter: one, or those its fused module was made of."""
    module, _, attribute = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    return [f"{parent}.{source}.{attribute}" for source in fused[last]] if last in fused else [name]
