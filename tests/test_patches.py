"""Tests of Patchify: patch values and positions must equal those of transformers' image processors and towers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ops import one_thread  # noqa: F401 - applies to every test here
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids

from conftest import Family, serving, write_bert
from triton_embed.kernels.ops import Ops
from triton_embed.python_backend.checkpoint.config import ModelConfig
from triton_embed.python_backend.networks.patches import PatchGrid, Patchify
from triton_embed.python_backend.spec import EncoderSpec

OPS = Ops.on("cpu", torch.float32)
Channels = tuple[float, float, float]
MEAN, STD = (0.1, 0.45, 0.8), (0.2, 0.3, 0.7)  # far apart, so that swapped channels are detected
# patch, merge, frames, and height and width of the image
LAYOUTS = [(4, 2, 2, 24, 40), (14, 2, 2, 28, 84), (3, 3, 1, 27, 9), (5, 1, 3, 5, 10), (2, 4, 2, 8, 8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = write_bert(tmp_path_factory.mktemp("patches") / "tiny")
    config = ModelConfig.from_checkpoint(directory, serving(), EncoderSpec())
    return dataclasses.replace(config, image_normalization=(MEAN, STD))


def make_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("patch", "merge", "frames", "height", "width"), LAYOUTS)
def test_patches_equal_those_of_transformers_in_the_same_order(
    patch: int, merge: int, frames: int, height: int, width: int, model: ModelConfig
) -> None:
    ours, image = Patchify(OPS, model, patch, merge, frames, "cpu"), make_image(height, width)
    theirs = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=merge, temporal_patch_size=frames, image_mean=MEAN, image_std=STD
    )([image], do_resize=False, return_tensors="pt")
    patches, grid = ours(image), ours.grid(image)
    assert patches.dtype == torch.float32
    assert patches.shape == theirs["pixel_values"].shape
    assert (patches - theirs["pixel_values"]).abs().max() <= 1e-5
    assert theirs["image_grid_thw"].tolist() == [[1, grid.rows, grid.columns]]
    assert grid.count == len(patches)
    positions = get_vision_position_ids(theirs["image_grid_thw"], merge)
    assert ours.positions(grid).tolist() == positions.T.tolist()


def test_positions_match_the_order_of_the_patches(model: ModelConfig) -> None:
    """Test an image whose pixel values are the row and the column of their patch."""
    rows, columns = np.indices((6, 10))
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    ours = Patchify(OPS, dataclasses.replace(model, image_normalization=((0.0,) * 3, (1 / 255,) * 3)), 4, 2, 1, "cpu")
    patches = ours(image).view(-1, 3, 16)
    assert patches[:, :2].amax(2).T.round().tolist() == ours.positions(ours.grid(image)).tolist()


def test_image_that_is_not_contiguous_in_memory_is_accepted(model: ModelConfig) -> None:
    """Test a view, which numpy returns for cropped and rotated images."""
    ours, image = Patchify(OPS, model, 4, 2, 2, "cpu"), make_image(40, 24)
    assert torch.equal(ours(image[::-1].transpose(1, 0, 2)), ours(image[::-1].transpose(1, 0, 2).copy()))


def test_clip_patches_are_in_row_order(tiny: Callable[[str], Family], tmp_path: Path) -> None:
    """Compare the image assembled from the patches with the one that transformers normalizes."""
    clip = tiny("clip-openai")
    size, patch = clip.model.network_config.image_size, clip.model.network_config.patch_size
    image = make_image(size, size)
    theirs = CLIPImageProcessorPil.from_pretrained(clip.directory)(image, return_tensors="pt")["pixel_values"][0]
    patches = Patchify(OPS, clip.model, patch, 1, 1, "cpu")(image).view(size // patch, size // patch, 3, patch, patch)
    assert (patches.permute(2, 0, 3, 1, 4).reshape(3, size, size) - theirs).abs().max() <= 1e-5


def test_constants_are_real_on_the_meta_device(model: ModelConfig) -> None:
    with torch.device("meta"):
        ours = Patchify(OPS, model, 4, 2, 2, "cpu")
    assert ours(make_image(8, 8)).device.type == "cpu"
    assert ours.positions(PatchGrid(2, 2)).device.type == "cpu"
