"""Loading safetensors into parameters: every value is in its place, and errors name the file and the tensor.

safetensors itself writes the files. The expected value of a parameter is the written one, concatenated by torch.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from triton_embed.kernels.ops import Ops
from triton_embed.python_backend.errors import ConfigError
from triton_embed.python_backend.networks import weights
from triton_embed.python_backend.networks.layers import FusedLinear, Projection
from triton_embed.python_backend.networks.weights import Naming

OPS = Ops.on("cpu", torch.float32)
NAMING = Naming(
    renames=(("bert.", ""), ("model.inner.", ""), ("model.", "")),
    fused={"qkv": ("query", "key", "value")},
    ignored=("pooler.", "cls."),
    ignored_endings=(".position_ids", "rotary.inv_freq"),
)


class Network(nn.Module):
    """An embedding table, a fused projection of 8 + 2 + 2 rows, a norm, and a projection that stays in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(11, 6)
        self.block = nn.ModuleDict(
            {"self": nn.ModuleDict({"qkv": FusedLinear(OPS, 6, (8, 2, 2))}), "norm": nn.LayerNorm(6)}
        )
        self.projection = Projection(OPS, 6, 4, bias=False)


PARTS = {"query": 8, "key": 2, "value": 2}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a checkpoint of `Network` with random values."""
    shapes = {
        "embeddings.weight": (11, 6),
        "block.norm.weight": (6,),
        "block.norm.bias": (6,),
        "projection.weight": (4, 6),
    }
    for name, rows in PARTS.items():
        shapes |= {f"block.self.{name}.weight": (rows, 6), f"block.self.{name}.bias": (rows,)}
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def load(directory: Path, dtype: torch.dtype = torch.float32, naming: Naming = NAMING) -> Network:
    with torch.device("meta"):
        network = Network()
    weights.load(network, naming, directory, dtype, "cpu")
    return network


def expected(stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the parameters that `Network` must have after loading `stored` in `dtype`."""
    parameters = {name: tensor for name, tensor in stored.items() if ".self." not in name}
    for kind in ("weight", "bias"):
        parameters[f"block.self.qkv.{kind}"] = torch.cat([stored[f"block.self.{name}.{kind}"] for name in PARTS])
    own_dtypes = {"projection.weight": torch.float32}
    return {name: tensor.to(own_dtypes.get(name, dtype)) for name, tensor in parameters.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefix", ["", "bert.", "model.", "model.inner."])
def test_every_value_is_loaded_in_the_requested_dtype(
    prefix: str, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    written = tensors(stored)
    names = ("pooler.dense.weight", f"{prefix}pooler.bias", "cls.bias", f"{prefix}embeddings.position_ids")
    extra = {name: torch.arange(3) for name in (*names, f"{prefix}block.self.rotary.inv_freq")}
    save_file({**{prefix + name: x for name, x in written.items()}, **extra}, tmp_path / "model.safetensors")
    loaded = dict(load(tmp_path, dtype).named_parameters())
    correct = expected(written, dtype)
    assert loaded.keys() == correct.keys()
    for name, value in loaded.items():
        assert torch.equal(value, correct[name]), name
        assert (value.dtype, value.requires_grad) == (correct[name].dtype, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_module_that_declares_a_dtype_keeps_it(dtype: torch.dtype, tmp_path: Path) -> None:
    """Load fp32 values that half precision cannot represent; a conversion in between would change them."""
    written = {**tensors(), "projection.weight": torch.full((4, 6), 1.0 + 2**-20)}
    save_file(written, tmp_path / "model.safetensors")
    network = load(tmp_path, dtype)
    assert torch.equal(network.projection.weight, written["projection.weight"])
    assert network.embeddings.weight.dtype == dtype


def test_first_matching_rename_applies_and_only_to_a_prefix(tmp_path: Path) -> None:
    """Check that the shorter `model.` does not rename `model.inner.`, and that `bert.` inside a name stays."""
    written = {f"model.inner.{name}": tensor for name, tensor in tensors().items()}
    save_file(written, tmp_path / "model.safetensors")
    load(tmp_path)
    shorter_first = replace(NAMING, renames=(("model.", ""), ("model.inner.", "")))
    with pytest.raises(ConfigError, match=r"'embeddings\.weight' is missing"):
        load(tmp_path, naming=shorter_first)
    save_file({**written, "block.bert.x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"'block\.bert\.x' is not part"):
        load(tmp_path)


def test_tensor_is_renamed_once(tmp_path: Path) -> None:
    written = {f"bert.model.{name}": tensor for name, tensor in tensors().items()}
    save_file(written, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"'embeddings\.weight' is missing"):
        load(tmp_path)


def test_rename_replaces_one_prefix_by_another(tmp_path: Path) -> None:
    """Replace a prefix, as for `model.language_model.` in transformers 5, which is `model.` on the hub."""
    written = tensors()
    save_file({name.replace("block.", "layer."): x for name, x in written.items()}, tmp_path / "model.safetensors")
    loaded = dict(load(tmp_path, naming=replace(NAMING, renames=(("layer.", "block."),))).named_parameters())
    for name, value in expected(written, torch.float32).items():
        assert torch.equal(loaded[name], value), name


def test_tensor_that_is_not_ignored_is_refused(tmp_path: Path) -> None:
    save_file({**tensors(), "pooler.bias": torch.ones(1)}, tmp_path / "model.safetensors")
    load(tmp_path)
    with pytest.raises(ConfigError, match=r"'pooler\.bias' is not part of this network \(1 unexpected tensors\)"):
        load(tmp_path, naming=replace(NAMING, ignored=()))


def test_two_tensors_for_one_parameter_are_refused(tmp_path: Path) -> None:
    """Refuse them, because otherwise the last one would silently win."""
    written = tensors()
    save_file({**written, "bert.block.norm.bias": torch.ones(6)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors: tensors '.*' and '.*' both map to") as refused:
        load(tmp_path)
    for word in ("'block.norm.bias'", "'bert.block.norm.bias'"):
        assert word in str(refused.value)


def test_two_shards_with_one_tensor_are_refused(tmp_path: Path) -> None:
    written = tensors()
    for shard_name in ("model-1.safetensors", "model-2.safetensors"):
        save_file(written, tmp_path / shard_name)
    index = {"weight_map": {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(written)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=rf"{tmp_path}/model-2\.safetensors: tensors '.*' both map to"):
        load(tmp_path)


def shard(directory: Path, written: Mapping[str, Tensor]) -> None:
    """Write two shards and their index. Tensors alternate between the shards."""
    names = list(written)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in files.items():
        save_file({name: written[name] for name in inside}, directory / file)
    index = {"weight_map": {name: file for file, inside in files.items() for name in inside}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_fused_projection_is_loaded_from_several_shards(tmp_path: Path) -> None:
    written = tensors()
    shard(tmp_path, written)
    loaded = dict(load(tmp_path).named_parameters())
    for name, value in expected(written, torch.float32).items():
        assert torch.equal(loaded[name], value), name


def test_missing_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path, tensors())
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-2\.safetensors, which is missing"):
        load(tmp_path)


def test_shard_missing_from_the_index_is_not_read(tmp_path: Path) -> None:
    shard(tmp_path, tensors())
    (tmp_path / "invalid.safetensors").write_bytes(b"invalid")
    load(tmp_path)


@pytest.mark.parametrize("name", list(tensors()))
def test_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    written = tensors()
    del written[name]
    save_file(written, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}") + rf".*'{re.escape(name)}' is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["block.self.inv_freq", "lm_head.weight", "poolers.x", "encoder.pooler.x", "position_ids", "x.position_ids.y"],
)
def test_unexpected_tensor_is_named(name: str, tmp_path: Path) -> None:
    save_file({**tensors(), name: torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'model.safetensors'}: tensor '{name}' is not part")):
        load(tmp_path)


def test_unexpected_tensors_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    extra = {name: torch.ones(1) for name in ("c.weight", "b.weight", "cls.weight", "d.weight")}
    save_file({**tensors(), **extra}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"'b\.weight' is not part of this network \(3 unexpected tensors\)"):
        load(tmp_path)


@pytest.mark.parametrize("shape", [(3, 6), (7, 6), (2, 5), (12,), (2, 6, 1)], ids=str)
@pytest.mark.parametrize("name", [f"block.self.{part}.weight" for part in PARTS])
def test_part_of_a_fused_tensor_with_a_wrong_shape_is_named(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({**tensors(), name: torch.ones(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=re.escape(name)) as refused:
        load(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(refused.value)
    assert str(list(shape)) in str(refused.value)


def test_wrong_parts_with_the_right_total_are_refused(tmp_path: Path) -> None:
    """Refuse 7 + 3 + 2 rows instead of 8 + 2 + 2: the sum is the same, but every head would be wrong."""
    changed = {"block.self.query.weight": torch.ones(7, 6), "block.self.key.weight": torch.ones(3, 6)}
    save_file({**tensors(), **changed}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"block\.self\.(query|key)\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("shape", [(10, 6), (11, 7), (66,)], ids=str)
def test_tensor_with_a_wrong_shape_is_named_with_both_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({**tensors(), "embeddings.weight": torch.ones(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"'embeddings\.weight'") as refused:
        load(tmp_path)
    for word in (str(tmp_path / "model.safetensors"), str(list(shape)), "[11, 6]"):
        assert word in str(refused.value)


@pytest.mark.parametrize("damage", ["cut in the data", "cut in the header", "empty", "text", "a directory"])
def test_unreadable_file_is_named(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    content = file.read_bytes()
    file.unlink()
    if damage == "a directory":
        file.mkdir()
    else:
        damaged = {
            "cut in the data": content[:-10],
            "cut in the header": content[:100],
            "empty": b"",
            "text": b"<html>" * 9,
        }
        file.write_bytes(damaged[damage])
    with pytest.raises(ConfigError, match=re.escape(f"{file} cannot be read")):
        load(tmp_path)


def test_file_is_not_mapped_after_loading(tmp_path: Path) -> None:
    """Check that no mapping remains: replacing the file would kill the process with SIGBUS."""
    save_file(tensors(), tmp_path / "model.safetensors")
    network = load(tmp_path)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(network.embeddings.weight, tensors()["embeddings.weight"])


MEGABYTE = 1 << 20
# Runs in a separate process. It loads a small file first, so that memory the libraries keep is not counted.
LOAD = """
    import sys
    from pathlib import Path
    import torch
    from torch import nn
    from triton_embed.kernels.ops import Ops
    from triton_embed.python_backend.networks import weights
    from triton_embed.python_backend.networks.layers import FusedLinear

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    def load(directory, layers, rows, dtype):
        with torch.device("meta"):
            fused = (FusedLinear(Ops.reference(), 256, (2 * rows, rows, rows), bias=False) for _ in range(layers))
            network = nn.ModuleList(nn.ModuleDict({"qkv": linear}) for linear in fused)
        weights.load(network, weights.Naming(fused={"qkv": ("a", "b", "c")}), directory, dtype, "cpu")
        return network

    small, large = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        load(small, 2, 8, dtype)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        network = load(large, 30, 512, dtype)
        print(status("VmHWM") - before)
        del network
"""


def _write_layers(directory: Path, layers: int, rows: int) -> Path:
    directory.mkdir()
    sizes = {"a": 2 * rows, "b": rows, "c": rows}
    layer = {f"{i}.{part}.weight": torch.ones(size, 256) for i in range(layers) for part, size in sizes.items()}
    save_file(layer, directory / "model.safetensors")
    return directory


def test_peak_memory_of_loading_is_the_weights_plus_one_tensor(tmp_path: Path) -> None:
    """Measure the peak. A 60 MB file that stays mapped, or tensors kept until the end, would double it."""
    small, large = _write_layers(tmp_path / "small", 2, 8), _write_layers(tmp_path / "large", 30, 512)
    assert (large / "model.safetensors").stat().st_size // MEGABYTE == 60
    command = [sys.executable, "-c", textwrap.dedent(LOAD), str(small), str(large)]
    # glibc keeps free blocks of several MB in its heap unless every tensor is a separate mmap.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment).stdout
    single, half = (int(grown) / MEGABYTE for grown in printed.split())
    assert 60 <= single <= 1.15 * 60
    assert 30 <= half <= 1.25 * 30
