"""The samples of `verify`: texts of every length and script, and images that Pillow opens."""

import io

from PIL import Image

from conftest import MINILM
from triton_embed.gateway.verify.samples import TEXTS, images


def test_texts_differ_and_have_no_outer_white_space() -> None:
    assert 30 <= len(TEXTS) <= 50
    assert len({text.casefold() for text in TEXTS}) == len(TEXTS) - 2  # one text occurs in three cases
    assert all(text == text.strip() for text in TEXTS)


def test_text_lengths_include_one_token_and_more_than_an_encoder_accepts() -> None:
    from transformers import AutoTokenizer

    lengths = [len(row) - 2 for row in AutoTokenizer.from_pretrained(MINILM)(list(TEXTS))["input_ids"]]
    assert min(lengths) == 1
    assert sum(length == 1 for length in lengths) >= 3
    assert 512 < max(lengths) < 1800  # longer than BERT accepts, but within the limit of GME


def test_images_have_three_shapes_and_are_deterministic() -> None:
    first, second = list(images()), list(images())
    assert first == second
    opened = [Image.open(io.BytesIO(image)) for image in first]
    assert [image.size for image in opened] == [(336, 336), (480, 272), (150, 600)]
    assert all(len(image.resize((16, 16)).getcolors()) > 100 for image in opened)
