"""Patches of pictures, their values and their places, against transformers' own image processors and towers."""

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
from triton_embed.python_backend.config import ModelConfig
from triton_embed.python_backend.patches import Grid, Patches
from triton_embed.python_backend.spec import EncoderSpec

Channels = tuple[float, float, float]
MEAN, STD = (0.1, 0.45, 0.8), (0.2, 0.3, 0.7)  # far apart: channels that change places show
# patch, merge, frames and the picture's height and width, of which no two are alike
LAYOUTS = [(4, 2, 2, 24, 40), (14, 2, 2, 28, 84), (3, 3, 1, 27, 9), (5, 1, 3, 5, 10), (2, 4, 2, 8, 8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = write_bert(tmp_path_factory.mktemp("patches") / "tiny")
    config = ModelConfig.from_checkpoint(directory, serving(), EncoderSpec())
    return dataclasses.replace(config, normalisation=(MEAN, STD))


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("patch", "merge", "frames", "height", "width"), LAYOUTS)
def test_patches_are_those_of_transformers_in_its_order(
    patch: int, merge: int, frames: int, height: int, width: int, model: ModelConfig
) -> None:
    ours, image = Patches(model, patch, merge, frames, "cpu"), picture(height, width)
    theirs = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=merge, temporal_patch_size=frames, image_mean=MEAN, image_std=STD
    )([image], do_resize=False, return_tensors="pt")
    found, grid = ours(image), ours.grid(image)
    assert found.dtype == torch.float32
    assert found.shape == theirs["pixel_values"].shape
    assert (found - theirs["pixel_values"]).abs().max() <= 1e-5
    assert theirs["image_grid_thw"].tolist() == [[1, grid.rows, grid.columns]]
    assert grid.count == len(found)
    places = get_vision_position_ids(theirs["image_grid_thw"], merge)
    assert ours.positions(grid).tolist() == places.T.tolist()


def test_every_patch_lies_where_its_position_says(model: ModelConfig) -> None:
    """A picture whose pixels are their patch's row and column."""
    rows, columns = np.indices((6, 10))
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    ours = Patches(dataclasses.replace(model, normalisation=((0.0,) * 3, (1 / 255,) * 3)), 4, 2, 1, "cpu")
    found = ours(image).view(-1, 3, 16)
    assert found[:, :2].amax(2).T.round().tolist() == ours.positions(ours.grid(image)).tolist()


def test_a_picture_that_does_not_lie_in_memory_as_it_is_read(model: ModelConfig) -> None:
    """numpy hands on crops and turned pictures as views."""
    ours, image = Patches(model, 4, 2, 2, "cpu"), picture(40, 24)
    assert torch.equal(ours(image[::-1].transpose(1, 0, 2)), ours(image[::-1].transpose(1, 0, 2).copy()))


def test_clips_patches_go_row_by_row(tiny: Callable[[str], Family], tmp_path: Path) -> None:
    """Put together again they are the picture as transformers normalises it."""
    clip = tiny("clip-openai")
    size, patch = clip.model.shape.image_size, clip.model.shape.patch_size
    image = picture(size, size)
    theirs = CLIPImageProcessorPil.from_pretrained(clip.directory)(image, return_tensors="pt")["pixel_values"][0]
    found = Patches(clip.model, patch, 1, 1, "cpu")(image).view(size // patch, size // patch, 3, patch, patch)
    assert (found.permute(2, 0, 3, 1, 4).reshape(3, size, size) - theirs).abs().max() <= 1e-5


def test_constants_are_real_where_parameters_are_not(model: ModelConfig) -> None:
    with torch.device("meta"):
        ours = Patches(model, 4, 2, 2, "cpu")
    assert ours(picture(8, 8)).device.type == "cpu"
    assert ours.positions(Grid(2, 2)).device.type == "cpu"
