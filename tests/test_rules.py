"""The rules that define each family's vectors, one test per rule: a rule broken in the engine fails its test.

Every test compares with transformers. Rules for texts and special tokens are in test_processors.py and
test_tokenizer.py, rules for image files in test_inputs_images.py.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from checkpoints import write_clip, write_decoder, write_qwen2_vl
from PIL import Image, ImageOps
from test_ops import one_thread  # noqa: F401 - applies to every test here
from torch import nn

from conftest import Family
from triton_embed.python_backend.inputs.parameters import Item
from triton_embed.python_backend.inputs.row import Row

TEXTS = ["hello world", "the cat sat on the mat and the dog ran after the cat", "x", "a photo of a dog and a hill " * 3]
Tiny = Callable[[str], Family]


def typed(*rows: Sequence[int]) -> list[Row]:
    return [Row(np.array(row, dtype=np.int32)) for row in rows]


def vectors(family: Family, rows: Sequence[Row]) -> np.ndarray:
    return family.embedder.embed(rows, [family.model.dimensions] * len(rows))


def item_vectors(family: Family, *items: Item) -> np.ndarray:
    return vectors(family, family.rows(*items))


def decoder_vectors(family: Family, texts: Sequence[str] = TEXTS) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of the engine and of transformers for the same texts."""
    rows = family.rows(*map(Item, texts))
    return vectors(family, rows), oracles.decoder_vectors(family.directory, [row.ids.tolist() for row in rows])


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 2e-5


def assert_different(first: np.ndarray, second: np.ndarray) -> None:
    """Check that the rule changes every vector; otherwise its test would prove nothing."""
    assert np.abs(first - second).max(axis=-1).min() > 1e-3


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Return a noisy image that is dark at the top left, so that a rotation changes its vector."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 90, (height, width, 3))
    return Image.fromarray((noise + 150 * (x / width + y / height)[..., None] / 2).astype(np.uint8))


def encoded(image: Image.Image, orientation: int = 1) -> bytes:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(stream, "PNG", exif=exif)
    return stream.getvalue()


def gme_vectors(family: Family, messages: Sequence[dict[str, object]], positions: str = "mrope") -> np.ndarray:
    inputs = oracles.gme_inputs(family.directory, messages, 4, 16)
    return oracles.gme_vectors(family.directory, list(inputs), positions)


# Attention


def test_gte_attention_is_causal_only_if_config_says_so(tmp_path: Path) -> None:
    result = {}
    for causal in (False, True):
        directory = write_decoder(tmp_path / str(causal), "qwen2", is_causal=causal)
        result[causal], expected = decoder_vectors(Family("gte_qwen2", directory))
        assert_same(result[causal], expected)
    # "x" and its end token are too few for the mask to matter.
    assert_different(result[False][[0, 1, 3]], result[True][[0, 1, 3]])


@pytest.mark.parametrize("name", ["e5_mistral-mistral-no-window", "qwen3_embedding-bare"])
def test_e5_and_qwen3_attention_is_causal(name: str, tiny: Tiny) -> None:
    assert_same(*decoder_vectors(tiny(name)))


@pytest.mark.parametrize("layers", [1, 2], ids=["the last layer", "any layer"])
@pytest.mark.parametrize("window", [1, 5, 6])
def test_mistral_attends_only_within_its_window(window: int, layers: int, tmp_path: Path) -> None:
    """Check the last layer, which computes one row per text, and a layer before it."""
    directory = write_decoder(tmp_path / "e5", "mistral", sliding_window=window, num_hidden_layers=layers)
    rows = [list(range(40, 40 + length)) for length in (1, window, window + 1, window + 2, 30)]
    assert_same(vectors(Family("e5_mistral", directory), typed(*rows)), oracles.decoder_vectors(directory, rows))


def test_qwen_window_applies_only_to_its_sliding_layers(tiny: Tiny) -> None:
    assert_same(*decoder_vectors(tiny("qwen3_embedding-window")))


def test_query_heads_use_the_key_head_of_their_group(tiny: Tiny) -> None:
    for name in ("e5_mistral-mistral-tied-one-key-head", "gte_qwen2-causal-fp16", "qwen3_embedding-sharded-wide-heads"):
        assert_same(*decoder_vectors(tiny(name)))


def test_qwen3_normalizes_query_and_key_heads(tiny: Tiny) -> None:
    assert_same(*decoder_vectors(tiny("qwen3_embedding-one-layer-fp16")))


# Positions


@pytest.mark.parametrize("old", [False, True], ids=["transformers 5", "transformers 4"])
def test_rope_base_comes_from_config(old: bool, tmp_path: Path) -> None:
    results = []
    for theta in (500.0, 1e6):
        rope = {"rope_type": "default", "rope_theta": theta}
        directory = write_decoder(tmp_path / str(theta), "mistral", old_rope=old, rope_parameters=rope)
        actual, expected = decoder_vectors(Family("e5_mistral", directory), TEXTS[1:2])
        assert_same(actual, expected)
        results.append(actual)
    assert_different(*results)


def test_image_positions_follow_the_image_positions_parameter(tiny: Tiny) -> None:
    images = [photo(60, 40, 0), photo(40, 130, 1)]
    messages = [{"text": "the cat", "images": images}, {"text": "", "images": images[:1]}]
    items = [Item("the cat", tuple(map(encoded, images))), Item("", (encoded(images[0]),))]
    directory, limits = tiny("gme_qwen2_vl-hub").directory, {"min_image_tokens": "4", "max_image_tokens": "16"}
    result = {}
    for rule in ("mrope", "sequential"):
        family = Family("gme_qwen2_vl", directory, image_positions=rule, **limits)
        result[rule] = item_vectors(family, *items)
        assert_same(result[rule], gme_vectors(family, messages, rule))
    assert_different(result["mrope"], result["sequential"])


# Pooling and truncated dimensions


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_decoder_pooling_comes_from_the_checkpoint(pooling: str, tmp_path: Path) -> None:
    directory = write_decoder(tmp_path / "gte", "qwen2", is_causal=False, pooling=pooling)
    family = Family("gte_qwen2", directory, pooling=pooling)
    rows = family.rows(*map(Item, TEXTS))
    ids = [row.ids.tolist() for row in rows]
    assert_same(vectors(family, rows), oracles.pooled_vectors(directory, ids, pooling))


@pytest.mark.parametrize("name", ["bge-bert-cls", "qwen3_embedding-bare", "clip-openai", "gme_qwen2_vl-hub"])
def test_truncated_vector_is_normalized_again(name: str, tiny: Tiny) -> None:
    family = tiny(name)
    rows, full = family.rows(*map(Item, TEXTS)), family.model.dimensions
    references = oracles.vectors_of(family.directory, [row.ids.tolist() for row in rows])
    sizes = [1, 5, full // 2, full - 1]
    for vector, size, reference in zip(
        family.embedder.embed(rows, sizes), sizes, torch.from_numpy(references), strict=True
    ):
        expected = nn.functional.normalize(reference[:size], dim=0).numpy()
        # A truncated vector is shorter than 1; dividing by its length enlarges the error.
        assert np.abs(vector[:size] - expected).max() <= 2e-5 / float(reference[:size].norm())
        assert abs(np.linalg.norm(vector[:size].astype(np.float64)) - 1) <= 1e-6


def test_clip_texts_of_a_batch_are_independent(tiny: Tiny) -> None:
    family = tiny("clip-openai")
    rows = family.rows(*map(Item, TEXTS))
    expected = oracles.clip_text_vectors(family.directory, [row.ids.tolist() for row in rows])
    assert_same(vectors(family, rows), expected)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_activation_comes_from_config(act: str, tmp_path: Path) -> None:
    directory = write_clip(tmp_path / "clip", hidden_act=act)
    family, image = Family("clip", directory), photo(60, 40, 0)
    actual = item_vectors(family, Item("a photo"), Item("", (encoded(image),)))
    text = oracles.clip_text_vectors(directory, oracles.token_ids(directory, ["a photo"]))
    assert_same(actual, np.concatenate([text, oracles.clip_image_vectors(directory, [image])]))


# Images


def test_images_of_an_item_keep_their_order(tiny: Tiny) -> None:
    family = tiny("gme_qwen2_vl-hub")
    images = [photo(60, 40, 0), photo(40, 130, 1), photo(48, 48, 2)]
    orders = [(0, 1), (1, 0), (2,), (2, 1, 0), (0,)]
    messages = [{"text": "the cat", "images": [images[i] for i in order]} for order in orders]
    items = [Item("the cat", tuple(encoded(images[i]) for i in order)) for order in orders]
    actual = item_vectors(family, *items)
    assert_same(actual, gme_vectors(family, messages))
    assert_different(actual[0], actual[1])


def test_clip_returns_mixed_texts_and_images_in_input_order(tiny: Tiny) -> None:
    family, images = tiny("clip-openai"), [photo(60, 40, 0), photo(40, 130, 1)]
    items = [Item("", (encoded(images[0]),)), Item("a cat"), Item("", (encoded(images[1]),)), Item("x")]
    actual = item_vectors(family, *items)
    texts = oracles.clip_text_vectors(family.directory, oracles.token_ids(family.directory, ["a cat", "x"]))
    photos = oracles.clip_image_vectors(family.directory, images)
    assert_same(actual, np.stack([photos[0], texts[0], photos[1], texts[1]]))


@pytest.mark.parametrize("size", [(140, 28), (28, 140), (90, 60)], ids=str)
def test_rows_and_columns_of_an_image_are_not_swapped(size: tuple[int, int], tmp_path: Path) -> None:
    """Check patch positions and the merging of patches into tokens on images that are not square."""
    family = Family("gme_qwen2_vl", write_qwen2_vl(tmp_path / "gme"), min_image_tokens="4", max_image_tokens="16")
    image = photo(*size, seed=0)
    expected = gme_vectors(family, [{"text": "", "images": [image]}])
    assert_same(item_vectors(family, Item("", (encoded(image),))), expected)


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
@pytest.mark.parametrize("name", ["clip-openai", "gme_qwen2_vl-hub"])
def test_exif_orientation_is_applied(name: str, orientation: int, tiny: Tiny) -> None:
    family, data = tiny(name), encoded(photo(90, 60, 0), orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    actual = item_vectors(family, Item("", (data,)))
    expected = (
        oracles.clip_image_vectors(family.directory, [upright])
        if name == "clip-openai"
        else gme_vectors(family, [{"text": "", "images": [upright]}])
    )
    assert_same(actual, expected)
    assert_different(actual, item_vectors(family, Item("", (encoded(photo(90, 60, 0)),))))
