"""safetensors into parameters: every value where it belongs, and every fault named by file and tensor.

The files are written by safetensors itself; what a parameter must hold is what was written, concatenated by torch.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from triton_embed.python_backend import weights
from triton_embed.python_backend.errors import ConfigError


class Network(nn.Module):
    """One fused projection of 3 x 4 rows, a table and a norm, two levels deep."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(11, 6)
        self.block = nn.ModuleDict({"self": nn.ModuleDict({"qkv": nn.Linear(6, 12)}), "norm": nn.LayerNorm(6)})


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A checkpoint for it, all values different."""
    shapes = {"embeddings.weight": (11, 6), "block.norm.weight": (6,), "block.norm.bias": (6,)}
    for name in ("query", "key", "value"):
        shapes |= {f"block.self.{name}.weight": (4, 6), f"block.self.{name}.bias": (4,)}
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Network:
    with torch.device("meta"):
        network = Network()
    weights.load(
        network,
        directory,
        prefixes=("bert.", "model."),
        fused={"qkv": ("query", "key", "value")},
        ignored=("pooler.", "cls."),
        dtype=dtype,
        device="cpu",
    )
    return network


def expected(stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    found = {name: tensor for name, tensor in stored.items() if ".self." not in name}
    for kind in ("weight", "bias"):
        parts = [stored[f"block.self.{name}.{kind}"] for name in ("query", "key", "value")]
        found[f"block.self.qkv.{kind}"] = torch.cat(parts)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefix", ["", "bert.", "model."])
def test_every_value_arrives_in_the_dtype_asked_for(
    prefix: str, stored: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    written = tensors(stored)
    extra = {"pooler.dense.weight": torch.ones(2), f"{prefix}pooler.bias": torch.ones(1), "cls.bias": torch.ones(3)}
    save_file({**{prefix + name: x for name, x in written.items()}, **extra}, tmp_path / "model.safetensors")
    found = dict(load(tmp_path, wanted).named_parameters())
    right = expected(written, wanted)
    assert found.keys() == right.keys()
    for name, value in found.items():
        assert torch.equal(value, right[name]), name
        assert (value.dtype, value.requires_grad) == (wanted, False)


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    """Whichever came last would win."""
    written = tensors()
    save_file({**written, "bert.block.norm.bias": torch.ones(6)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors.*block\.norm\.bias"):
        load(tmp_path)


def shard(directory: Path, written: Mapping[str, Tensor]) -> None:
    """Two files and their index, every other tensor in each."""
    names = list(written)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in files.items():
        save_file({name: written[name] for name in inside}, directory / file)
    index = {"weight_map": {name: file for file, inside in files.items() for name in inside}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_fused_projection_may_lie_across_shards(tmp_path: Path) -> None:
    written = tensors()
    shard(tmp_path, written)
    found = dict(load(tmp_path).named_parameters())
    for name, value in expected(written, torch.float32).items():
        assert torch.equal(found[name], value), name


def test_a_missing_shard(tmp_path: Path) -> None:
    shard(tmp_path, tensors())
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-2\.safetensors, which is missing"):
        load(tmp_path)


def test_a_shard_that_the_index_does_not_name_is_not_read(tmp_path: Path) -> None:
    shard(tmp_path, tensors())
    (tmp_path / "rubbish.safetensors").write_bytes(b"rubbish")
    load(tmp_path)


@pytest.mark.parametrize("name", list(tensors()))
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    written = tensors()
    del written[name]
    save_file(written, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}") + rf".*'{re.escape(name)}' is missing"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["block.self.rotary.inv_freq", "lm_head.weight", "poolers.x", "encoder.pooler.x"])
def test_a_tensor_the_network_has_no_place_for_is_named(name: str, tmp_path: Path) -> None:
    save_file({**tensors(), name: torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'model.safetensors'}: tensor '{name}' is not part")):
        load(tmp_path)


@pytest.mark.parametrize("shape", [(3, 6), (5, 6), (4, 5), (24,), (4, 6, 1)], ids=str)
@pytest.mark.parametrize("name", [f"block.self.{part}.weight" for part in ("query", "key", "value")])
def test_a_part_of_a_fused_tensor_that_has_another_shape_is_named(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    save_file({**tensors(), name: torch.ones(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=re.escape(name)) as refused:
        load(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(refused.value)
    assert str(list(shape)) in str(refused.value)


def test_parts_of_a_fused_tensor_do_not_make_up_for_each_other(tmp_path: Path) -> None:
    """5 + 3 + 4 rows are as many as 4 + 4 + 4, and every head would be wrong."""
    changed = {"block.self.query.weight": torch.ones(5, 6), "block.self.key.weight": torch.ones(3, 6)}
    save_file({**tensors(), **changed}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"block\.self\.(query|key)\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("shape", [(10, 6), (11, 7), (66,)], ids=str)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({**tensors(), "embeddings.weight": torch.ones(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"'embeddings\.weight'") as refused:
        load(tmp_path)
    for word in (str(tmp_path / "model.safetensors"), str(list(shape)), "[11, 6]"):
        assert word in str(refused.value)


@pytest.mark.parametrize("damage", ["cut in the data", "cut in the header", "empty", "text", "a directory"])
def test_a_file_that_cannot_be_read_is_named(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    whole = file.read_bytes()
    file.unlink()
    if damage == "a directory":
        file.mkdir()
    else:
        pieces = {"cut in the data": whole[:-10], "cut in the header": whole[:100], "empty": b"", "text": b"<html>" * 9}
        file.write_bytes(pieces[damage])
    with pytest.raises(ConfigError, match=re.escape(f"{file} cannot be read")):
        load(tmp_path)
