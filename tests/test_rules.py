"""The rules that a family's vectors live by, one test a rule: break a rule in the engine and its test says so.

Each compares with transformers. Rules about texts and special tokens are in test_processors.py and test_tokenizer.py,
those about image files in test_inputs_images.py.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from checkpoints import CASES, write_clip, write_decoder, write_qwen2_vl
from PIL import Image, ImageOps
from test_ops import one_thread  # noqa: F401 - applies to every test here
from test_vectors import vectors_of
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


def items(family: Family, *asked: Item) -> np.ndarray:
    return vectors(family, family.rows(*asked))


def decoder(family: Family, texts: Sequence[str] = TEXTS) -> tuple[np.ndarray, np.ndarray]:
    """(ours, transformers') for these texts."""
    rows = family.rows(*map(Item, texts))
    return vectors(family, rows), oracles.decoder_vectors(family.directory, [row.ids.tolist() for row in rows])


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 2e-5


def assert_apart(one: np.ndarray, other: np.ndarray) -> None:
    """The rule shows in these vectors, or its test would prove nothing."""
    assert np.abs(one - other).max(axis=-1).min() > 1e-3


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Dark at the top left, so that a turned picture shows."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 90, (height, width, 3))
    return Image.fromarray((noise + 150 * (x / width + y / height)[..., None] / 2).astype(np.uint8))


def encoded(image: Image.Image, orientation: int = 1) -> bytes:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(stream, "PNG", exif=exif)
    return stream.getvalue()


def gme(family: Family, asked: Sequence[dict[str, object]], positions: str = "mrope") -> np.ndarray:
    inputs = oracles.gme_inputs(family.directory, asked, 4, 16)
    return oracles.gme_vectors(family.directory, list(inputs), positions)


# Attention


def test_gte_is_causal_or_bidirectional_as_its_config_says(tmp_path: Path) -> None:
    found = {}
    for causal in (False, True):
        directory = write_decoder(tmp_path / str(causal), "qwen2", is_causal=causal)
        found[causal], wanted = decoder(Family("gte_qwen2", directory))
        assert_same(found[causal], wanted)
    assert_apart(found[False][[0, 1, 3]], found[True][[0, 1, 3]])  # "x" and its end are too short to tell


@pytest.mark.parametrize("name", ["e5_mistral-mistral-no-window", "qwen3_embedding-bare"])
def test_e5_and_qwen3_are_causal(name: str, tiny: Tiny) -> None:
    assert_same(*decoder(tiny(name)))


@pytest.mark.parametrize("layers", [1, 2], ids=["the last layer", "any layer"])
@pytest.mark.parametrize("window", [1, 5, 6])
def test_mistral_sees_the_keys_of_its_window_and_no_others(window: int, layers: int, tmp_path: Path) -> None:
    """In its last layer, where one row is left, and in those before it."""
    directory = write_decoder(tmp_path / "e5", "mistral", sliding_window=window, num_hidden_layers=layers)
    rows = [list(range(40, 40 + length)) for length in (1, window, window + 1, window + 2, 30)]
    assert_same(vectors(Family("e5_mistral", directory), typed(*rows)), oracles.decoder_vectors(directory, rows))


def test_qwens_window_holds_only_in_the_layers_that_have_one(tiny: Tiny) -> None:
    assert_same(*decoder(tiny("qwen3_embedding-window")))


def test_query_heads_share_the_key_head_of_their_group(tiny: Tiny) -> None:
    for name in ("e5_mistral-mistral-tied-one-key-head", "gte_qwen2-causal-fp16", "qwen3_embedding-sharded-wide-heads"):
        assert_same(*decoder(tiny(name)))


def test_qwen3_norms_its_query_and_key_heads(tiny: Tiny) -> None:
    assert_same(*decoder(tiny("qwen3_embedding-one-layer-fp16")))


# Positions


@pytest.mark.parametrize("old", [False, True], ids=["transformers 5", "transformers 4"])
def test_the_rope_base_is_the_configs(old: bool, tmp_path: Path) -> None:
    found = []
    for theta in (500.0, 1e6):
        rope = {"rope_type": "default", "rope_theta": theta}
        directory = write_decoder(tmp_path / str(theta), "mistral", old_rope=old, rope_parameters=rope)
        ours, wanted = decoder(Family("e5_mistral", directory), TEXTS[1:2])
        assert_same(ours, wanted)
        found.append(ours)
    assert_apart(*found)


def test_image_tokens_lie_on_a_grid_or_on_a_line_as_the_operator_says(tiny: Tiny) -> None:
    images = [photo(60, 40, 0), photo(40, 130, 1)]
    asked = [{"text": "the cat", "images": images}, {"text": "", "images": images[:1]}]
    sent = [Item("the cat", tuple(map(encoded, images))), Item("", (encoded(images[0]),))]
    directory, limits = tiny("gme_qwen2_vl-hub").directory, {"min_image_tokens": "4", "max_image_tokens": "16"}
    found = {}
    for rule in ("mrope", "sequential"):
        family = Family("gme_qwen2_vl", directory, image_positions=rule, **limits)
        found[rule] = items(family, *sent)
        assert_same(found[rule], gme(family, asked, rule))
    assert_apart(found["mrope"], found["sequential"])


# Pooling and cutting


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_a_decoder_is_pooled_as_its_checkpoint_says(pooling: str, tmp_path: Path) -> None:
    directory = write_decoder(tmp_path / "gte", "qwen2", is_causal=False, pooling=pooling)
    family = Family("gte_qwen2", directory, pooling=pooling)
    rows = family.rows(*map(Item, TEXTS))
    states = oracles.decoder_states(directory, [row.ids.tolist() for row in rows])
    pools = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "max": lambda x: x.amax(0), "last": lambda x: x[-1]}
    wanted = torch.stack([nn.functional.normalize(pools[pooling](state), dim=0) for state in states])
    assert_same(vectors(family, rows), wanted.numpy())


@pytest.mark.parametrize("name", ["bge-bert-cls", "qwen3_embedding-bare", "clip-openai", "gme_qwen2_vl-hub"])
def test_a_cut_vector_is_normalised_again(name: str, tiny: Tiny) -> None:
    family = tiny(name)
    rows, full = family.rows(*map(Item, TEXTS)), family.model.dimensions
    (case,) = [case for case in CASES if case.name == name]
    whole = vectors_of(case, family.directory, [row.ids.tolist() for row in rows])
    sizes = [1, 5, full // 2, full - 1]
    for vector, size, before in zip(family.embedder.embed(rows, sizes), sizes, torch.from_numpy(whole), strict=True):
        wanted = nn.functional.normalize(before[:size], dim=0).numpy()
        # What the cut leaves is short, and dividing by it makes an error larger.
        assert np.abs(vector[:size] - wanted).max() <= 2e-5 / float(before[:size].norm())
        assert abs(np.linalg.norm(vector[:size].astype(np.float64)) - 1) <= 1e-6


def test_clips_texts_do_not_leak_into_each_other(tiny: Tiny) -> None:
    family = tiny("clip-openai")
    rows = family.rows(*map(Item, TEXTS))
    wanted = oracles.clip_text_vectors(family.directory, [row.ids.tolist() for row in rows])
    assert_same(vectors(family, rows), wanted)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clips_activation_is_the_configs(act: str, tmp_path: Path) -> None:
    directory = write_clip(tmp_path / "clip", hidden_act=act)
    family, image = Family("clip", directory), photo(60, 40, 0)
    found = items(family, Item("a photo"), Item("", (encoded(image),)))
    wanted = oracles.clip_text_vectors(directory, oracles.ids_of(directory, ["a photo"]))
    assert_same(found, np.concatenate([wanted, oracles.clip_image_vectors(directory, [image])]))


# Pictures


def test_pictures_stay_in_the_order_they_were_sent(tiny: Tiny) -> None:
    family = tiny("gme_qwen2_vl-hub")
    images = [photo(60, 40, 0), photo(40, 130, 1), photo(48, 48, 2)]
    orders = [(0, 1), (1, 0), (2,), (2, 1, 0), (0,)]
    asked = [{"text": "the cat", "images": [images[i] for i in order]} for order in orders]
    sent = [Item("the cat", tuple(encoded(images[i]) for i in order)) for order in orders]
    found = items(family, *sent)
    assert_same(found, gme(family, asked))
    assert_apart(found[0], found[1])


def test_texts_and_pictures_of_clip_come_back_in_their_order(tiny: Tiny) -> None:
    family, images = tiny("clip-openai"), [photo(60, 40, 0), photo(40, 130, 1)]
    found = items(family, Item("", (encoded(images[0]),)), Item("a cat"), Item("", (encoded(images[1]),)), Item("x"))
    texts = oracles.clip_text_vectors(family.directory, oracles.ids_of(family.directory, ["a cat", "x"]))
    pictures = oracles.clip_image_vectors(family.directory, images)
    assert_same(found, np.stack([pictures[0], texts[0], pictures[1], texts[1]]))


@pytest.mark.parametrize("size", [(140, 28), (28, 140), (90, 60)], ids=str)
def test_rows_and_columns_of_a_picture_are_not_mixed_up(size: tuple[int, int], tmp_path: Path) -> None:
    """Its patches' positions, and the blocks of them that become one token, for shapes that are not square."""
    family = Family("gme_qwen2_vl", write_qwen2_vl(tmp_path / "gme"), min_image_tokens="4", max_image_tokens="16")
    image = photo(*size, seed=0)
    assert_same(items(family, Item("", (encoded(image),))), gme(family, [{"text": "", "images": [image]}]))


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
@pytest.mark.parametrize("name", ["clip-openai", "gme_qwen2_vl-hub"])
def test_a_photo_is_seen_upright(name: str, orientation: int, tiny: Tiny) -> None:
    family, data = tiny(name), encoded(photo(90, 60, 0), orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    found = items(family, Item("", (data,)))
    wanted = (
        oracles.clip_image_vectors(family.directory, [upright])
        if name == "clip-openai"
        else gme(family, [{"text": "", "images": [upright]}])
    )
    assert_same(found, wanted)
    assert_apart(found, items(family, Item("", (encoded(photo(90, 60, 0)),))))
