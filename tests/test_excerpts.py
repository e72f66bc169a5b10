"""Tests of excerpts: rows of long texts have the ids of transformers' tokenizers, which read the whole text."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_processors import BGE, CLIP_NEW, E5, GME, QWEN3, XLM, family_with
from transformers import AutoTokenizer

from conftest import MINILM, Family
from triton_embed.python_backend.errors import BadInput
from triton_embed.python_backend.inputs import excerpts
from triton_embed.python_backend.inputs import rows as rows_file
from triton_embed.python_backend.inputs.excerpts import Excerpt, excerpt, splits_at_spaces
from triton_embed.python_backend.inputs.parameters import Item
from triton_embed.python_backend.inputs.row import Row
from triton_embed.python_backend.inputs.rows import ItemRows

Tiny = Callable[[str], Family]
FAMILIES = {
    "WordPiece": BGE,
    "Unigram": XLM,
    "SentencePiece BPE": E5,
    "byte BPE": QWEN3,
    "CLIP": CLIP_NEW,
    "chat": GME,
}
LIMIT = 40  # tokens
SIZE = 300  # characters read at first
PIECES = [
    *(
        "the",
        "cat",
        "Hello",
        "world's",
        "x" * 70,
        "aaaaaaaaaaaaaaa",
        "naïve",
        "e\u0301",
        "你好世界",
        "。",
        "😀",
        "3.14",
        "!?",
    ),
    *(" ", " ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u0301", "\u200b", "_", "'s", "¼ ½"),
    *("<s>", "</s>", "[MASK]", "<|endoftext|>", "<|im_end|>", "▁", "Ġ"),
]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"FIRST_CHARACTERS": SIZE, "FIRST_PER_TOKEN": 1, "SEARCHED": 200, "BEGINNING": 60}.items():
            patch.setattr(excerpts, name, value)
        patch.setattr(rows_file, "MAX_CHARACTERS_PER_TOKEN", 1_000)  # refuse no text for want of a place to cut
        yield


def read(family: Family, text: str, limit: int = 10_000, **parameters: Any) -> ItemRows:
    rows = ItemRows(family.processor, parameters, np.array([[text.encode()]], dtype=np.object_), None, limit=limit)
    with ThreadPoolExecutor(1) as pool:
        rows.decode_images(pool)
    rows.set_ids(iter(family.processor.tokenizer.encode(rows.texts())))
    return rows


def row_of(family: Family, text: str, **parameters: Any) -> tuple[Row, Excerpt]:
    rows = read(family, text, **parameters)
    rows.make_rows(1_000_000)
    return rows.rows[0], rows._excerpts[0]


def random_texts() -> st.SearchStrategy[str]:
    texts = st.lists(st.sampled_from(PIECES), min_size=200, max_size=900).map("".join)
    return texts.filter(lambda text: bool(text.strip()))


# Failures are not made smaller, because that takes minutes.
QUICKLY = settings(deadline=None, max_examples=20, phases=(Phase.explicit, Phase.generate))


@pytest.mark.parametrize("truncate", ["end", "start"])
@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_ids_are_those_of_the_whole_text(tiny: Tiny, name: str, truncate: str) -> None:
    """Check the rows of random words, scripts, white space and special tokens, most of which are cut."""
    family, cuts = family_with(tiny, name, max_tokens=LIMIT), []

    @given(random_texts())
    @QUICKLY
    def check(text: str) -> None:
        row, part = row_of(family, text, truncate=truncate)
        (whole,) = family.rows(Item(text), truncate=truncate)
        assert row.ids.tolist() == whole.ids.tolist()
        assert (row.dropped > 0) == (whole.dropped > 0)
        cuts.append(not part.is_whole)

    check()
    assert any(cuts)


@pytest.mark.parametrize(("truncate", "side"), [("end", "right"), ("start", "left")])
def test_ids_of_minilm_are_those_of_transformers(truncate: str, side: str) -> None:
    family = Family("minilm", MINILM, max_tokens=str(LIMIT))
    theirs = AutoTokenizer.from_pretrained(MINILM, truncation_side=side)

    @given(random_texts())
    @QUICKLY
    def check(text: str) -> None:
        row, _ = row_of(family, text, truncate=truncate)
        assert row.ids.tolist() == theirs(text, truncation=True, max_length=LIMIT).input_ids

    check()


def test_dropped_tokens_are_estimated(tiny: Tiny) -> None:
    family = family_with(tiny, QWEN3, max_tokens=LIMIT)
    text = "the cat sat on the mat. " * 2_000
    row, part = row_of(family, text)
    (whole,) = family.rows(Item(text))
    assert len(part.text) < 600
    assert row.dropped == pytest.approx(whole.dropped, rel=0.02)


def test_text_that_must_not_be_truncated_is_refused(tiny: Tiny) -> None:
    rows = read(family_with(tiny, BGE, max_tokens=LIMIT), "the cat " * 10_000, truncate="none")
    with pytest.raises(BadInput) as caught:
        rows.make_rows(10_000)
    assert caught.value.error.message == (
        "The input (over 40 tokens) is longer than the model's context length (40 tokens)."
    )
    assert len(rows._excerpts[0].text) < 600


def test_text_needed_whole_is_refused_without_reading_it_whole(tiny: Tiny) -> None:
    family = family_with(tiny, BGE, max_tokens=LIMIT)
    with pytest.raises(BadInput) as caught:
        read(family, "the cat " * 100_000, limit=200, long_text="mean")
    assert caught.value.error.message == "Input has more than the 200 tokens a request may have"
    rows = read(family, "the cat " * 1_000, long_text="mean")
    assert rows._excerpts[0].is_whole
    assert len(rows._ids[0]) == 2_002


def test_few_tokens_are_read_on(tiny: Tiny) -> None:
    """Read words of which WordPiece makes one token each, in a text whose words are longer than the first excerpt."""
    family = family_with(tiny, BGE, max_tokens=LIMIT)
    text = ("x" * 150 + " ") * 200
    row, part = row_of(family, text)
    assert row.ids.tolist() == family.rows(Item(text))[0].ids.tolist()
    assert LIMIT * 150 < len(part.text) < len(text)


@pytest.mark.parametrize(
    ("truncate", "text"),
    [
        ("end", ("x" * 110 + " ") * 2 + ("a" * 150 + " ") * 300),  # the start of a word has more tokens than the word
        ("start", "!?" * 10 + "the cat" + (" " + "x" * 110) * 400),  # the beginning has tokens enough, the end does not
    ],
)
def test_cut_words_and_the_beginning_are_not_counted(tiny: Tiny, truncate: str, text: str) -> None:
    family = family_with(tiny, BGE, max_tokens=LIMIT)
    row, part = row_of(family, text, truncate=truncate)
    assert row.ids.tolist() == family.rows(Item(text), truncate=truncate)[0].ids.tolist()
    assert not part.is_whole


def test_text_without_a_place_to_cut_is_read_whole_up_to_a_limit() -> None:
    for text in ("x" * 900, "x" * 500 + "  \t" * 100, "。" * 900, "a " * 300 + "\u0301"):
        assert excerpt(text, SIZE, 1_000, 3, may_cut=text[0] != "a").is_whole
        with pytest.raises(BadInput, match=r"Input at index 3 has \d+ characters, more than the 299"):
            excerpt(text, SIZE, 299, 3)


def test_vocabularies_whose_pieces_continue_after_a_space_are_found(tiny: Tiny) -> None:
    assert not splits_at_spaces(["▁a", "of▁the"])
    assert not splits_at_spaces(["Ġa", "ofĠthe"])
    assert splits_at_spaces(["▁a", "▁▁▁", "Ġa", "xĠ"])  # Ġ is a letter where ▁ is the space
    for name in FAMILIES.values():
        assert tiny(name).processor.tokenizer.splits_at_spaces
