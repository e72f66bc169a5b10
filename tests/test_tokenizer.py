"""Text to ids against transformers' own tokenizers, and every rule about length.

MiniLM's is the real one: its tokenizer.json pads and cuts to 128 by itself, which must be switched off.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import MINILM, serving
from triton_embed.python_backend.config import ModelConfig
from triton_embed.python_backend.errors import BadRequest, ConfigError
from triton_embed.python_backend.row import Row
from triton_embed.python_backend.spec import EncoderSpec
from triton_embed.python_backend.tokenizer import Tokenizer

Theirs = Callable[..., list[int]]
LIMIT = 9
MODEL = dataclasses.replace(ModelConfig.from_checkpoint(MINILM, serving(), EncoderSpec()), max_tokens=LIMIT)
OURS = Tokenizer(MINILM, MODEL, None)
THEIRS = AutoTokenizer.from_pretrained(MINILM)
SIDES = {"end": "right", "start": "left"}

TEXTS = [
    "hello world",
    "  leading, trailing and   inner   space \t\n",
    "The quick brown fox can't jump over 3.14159 lazy dogs!",
    "为这个句子生成表示以用于检索相关文章：",
    "東京タワーは333メートルです。 한국어 문장",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 🙂 and a lone surrogate's place \N{REPLACEMENT CHARACTER}",
    "naïve café Ångström ﬁne Ⅷ ½",
    "e\u0301 combining, \u200bzero width\u200d, \u00a0no-break, \x07bell",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี",
    "[CLS] [SEP] [MASK] [UNK] [PAD] typed by hand",
    "<html><body onload='x'>&amp;</body></html>",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "x" * 101,
    "a",
    ".",
    "\u200b",
    " ",
    "",
    "word " * 400,
]


def cut_by_transformers(tokenizer: Any, text: str, limit: int, side: str) -> list[int]:
    tokenizer.truncation_side = SIDES[side]
    found: list[int] = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    return found


def test_ids_are_transformers_own() -> None:
    for text, ids in zip(TEXTS, OURS.encode(TEXTS), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == THEIRS(text)["input_ids"], text


def test_the_file_itself_would_pad_and_cut() -> None:
    """What the tests above would miss if the checkpoint were another."""
    stated = json.loads((MINILM / "tokenizer.json").read_text())
    assert stated["truncation"]["max_length"] < 400
    assert stated["padding"]


@settings(deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_ids_of_any_text_are_transformers_own(texts: list[str]) -> None:
    assert [ids.tolist() for ids in OURS.encode(texts)] == [THEIRS(text)["input_ids"] for text in texts]


@settings(deadline=None)
@given(text=st.text(max_size=30) | st.lists(st.sampled_from(["one", "two", "3", ",", "四"]), max_size=30).map(" ".join))
@pytest.mark.parametrize("side", SIDES)
def test_truncation_is_transformers_own(side: str, text: str) -> None:
    whole = THEIRS(text)["input_ids"]
    found = OURS.cut_text(OURS.encode([text])[0], side, 0)
    assert found.ids.tolist() == cut_by_transformers(THEIRS, text, LIMIT, side)
    assert found.dropped == len(whole) - len(found.ids)


@pytest.mark.parametrize("words", [LIMIT - 3, LIMIT - 2])
@pytest.mark.parametrize("truncate", ["end", "start", "none"])
def test_a_text_up_to_the_limit_is_left_alone(truncate: str, words: int) -> None:
    text = "dog " * words
    found = OURS.cut_text(OURS.encode([text])[0], truncate, 0)
    assert (found.ids.tolist(), found.dropped) == (THEIRS(text)["input_ids"], 0)


def test_a_text_beyond_the_limit_may_be_refused_instead() -> None:
    ids = OURS.encode(["dog " * (LIMIT - 1)])[0]
    with pytest.raises(BadRequest) as refused:
        OURS.cut_text(ids, "none", 3)
    assert str(refused.value).startswith("The input (10 tokens) is longer than the model's context length (9 tokens).")
    assert "index 3" in str(refused.value)


TEMPLATES = ["$A", "$A [SEP]", "[CLS] $A", "[CLS] [MASK] $A [SEP] [SEP]"]


def word_tokenizer(directory: Path, template: str = "[CLS] $A [SEP]") -> PreTrainedTokenizerFast:
    """transformers' wrapper around a tokenizer with this template, saved to `directory`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20)), "Big", "big"]
    fast = FastTokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3), ("[MASK]", 4)]
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]")
    theirs.save_pretrained(directory)
    return theirs


def model(**changes: Any) -> ModelConfig:
    shape = dataclasses.replace(MODEL.shape, vocab_size=27)
    return dataclasses.replace(MODEL, **{"shape": shape, "max_tokens": 6, **changes})


def fit_ids(tokenizer: Tokenizer, ids: np.ndarray, truncate: str, row: int) -> Row:
    """What becomes of ids that the caller made."""
    return tokenizer.cut_ids(tokenizer.check_ids(ids, row), truncate, row)


@pytest.mark.parametrize("words", [0, 1, 2, 4, 5, 6, 7, 19])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_special_token_survives_truncation(template: str, side: str, words: int, tmp_path: Path) -> None:
    theirs, text = word_tokenizer(tmp_path, template), " ".join(f"w{i}" for i in range(words))
    ours = Tokenizer(tmp_path, model(), None)
    found = ours.cut_text(ours.encode([text])[0], side, 0)
    assert found.ids.tolist() == cut_by_transformers(theirs, text, 6, side)
    assert found.dropped == len(theirs(text)["input_ids"]) - len(found.ids)


@pytest.mark.parametrize("words", [0, 1, 3, 4, 5, 6, 19])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("eos", ["[SEP]", "eos_token"])
@pytest.mark.parametrize("template", ["$A", "[CLS] $A", "[CLS] [MASK] $A", "[CLS] $A [SEP]", "$A [MASK] [SEP]"])
def test_every_text_ends_with_one_eos_whoever_puts_it_there(
    template: str, eos: str, side: str, words: int, tmp_path: Path
) -> None:
    """transformers' tokenizer puts it there itself."""
    theirs = word_tokenizer(tmp_path / "theirs", template if template.endswith("[SEP]") else f"{template} [SEP]")
    word_tokenizer(tmp_path / "ours", template)
    ours, text = Tokenizer(tmp_path / "ours", model(), eos), " ".join(f"w{i}" for i in range(words))
    whole = ours.encode([text])[0]
    found = ours.cut_text(whole, side, 0)
    assert whole.tolist() == theirs(text)["input_ids"]
    assert whole.dtype == np.int32
    assert found.ids.tolist() == cut_by_transformers(theirs, text, 6, side)
    assert found.dropped == len(whole) - len(found.ids)


def test_texts_that_end_with_another_token_are_refused(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, "[CLS] $A [SEP] [MASK]")
    with pytest.raises(ConfigError) as refused:
        Tokenizer(tmp_path, model(), "[SEP]")
    assert str(refused.value) == (
        f"{tmp_path / 'tokenizer.json'} ends texts with '[MASK]', the model was trained to see '[SEP]'"
    )


def test_a_tokenizer_without_the_token_that_texts_end_with(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, "$A")
    with pytest.raises(ConfigError, match=r"tokenizer\.json has no token '<\|endoftext\|>', which every text must end"):
        Tokenizer(tmp_path, model(), "<|endoftext|>")


@pytest.mark.parametrize("stated", ["[SEP]", {"content": "[SEP]", "__type": "AddedToken"}], ids=["plain", "nested"])
def test_the_eos_token_may_be_written_either_way(stated: object, tmp_path: Path) -> None:
    theirs = word_tokenizer(tmp_path, "[CLS] $A")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": stated}))
    found = Tokenizer(tmp_path, model(), "eos_token").encode(["w1"])[0]
    assert found.tolist() == [*theirs("w1")["input_ids"], 3]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "tokenizer_config.json is missing"),
        ("{}", "tokenizer_config.json: 'eos_token' is missing"),
        ('{"eos_token": null}', "tokenizer_config.json: 'eos_token' is missing"),
        ('{"eos_token": 7}', "tokenizer_config.json: eos_token is 7"),
        ('{"eos_token": {"lstrip": false}}', "tokenizer_config.json: eos_token: 'content' is missing"),
        ('{"eos_token": "</s>"}', "tokenizer.json has no token '</s>'"),
    ],
)
def test_a_tokenizer_that_does_not_say_what_texts_end_with(config: str | None, words: str, tmp_path: Path) -> None:
    word_tokenizer(tmp_path, "$A")
    (tmp_path / "tokenizer_config.json").unlink()
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ConfigError) as refused:
        Tokenizer(tmp_path, model(), "eos_token")
    assert words in str(refused.value)


def test_lowercase_where_sentence_transformers_asks_for_it(tmp_path: Path) -> None:
    theirs = word_tokenizer(tmp_path)
    for lowercase, text in ((True, "big big"), (False, "Big BIG")):
        ours = Tokenizer(tmp_path, model(lowercase=lowercase), None)
        assert ours.encode(["Big BIG"])[0].tolist() == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    ("pooling", "truncate", "expected"),
    [
        ("mean", "end", [10, 11, 12, 13]),
        ("mean", "start", [12, 13, 14, 15]),
        ("cls", "end", [10, 11, 12, 13]),
        ("cls", "start", [10, 13, 14, 15]),
        ("last", "end", [10, 11, 12, 15]),
        ("last", "start", [12, 13, 14, 15]),
    ],
)
def test_ids_of_the_caller_keep_the_one_that_is_pooled(
    pooling: str, truncate: str, expected: list[int], tmp_path: Path
) -> None:
    word_tokenizer(tmp_path)
    ours = Tokenizer(tmp_path, model(pooling=pooling, max_tokens=4), None)
    found = fit_ids(ours, np.arange(10, 16, dtype=np.int32), truncate, 0)
    assert (found.ids.tolist(), found.dropped) == (expected, 2)


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, MODEL.vocab_size - 1), min_size=1, max_size=3 * LIMIT),
    truncate=st.sampled_from(["end", "start"]),
)
def test_ids_of_the_caller_are_used_as_they_are(ids: list[int], truncate: str) -> None:
    found = fit_ids(OURS, np.array(ids, dtype=np.int32), truncate, 0)
    assert len(found.ids) == min(len(ids), LIMIT)
    assert found.dropped == len(ids) - len(found.ids)
    kept = ids[: len(found.ids)] if truncate == "end" else ids[-len(found.ids) :]
    assert found.ids.tolist() == kept


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], ["index 5 cannot be empty"]),
        ([7, -1, 7], ["index 5", "-1", "vocabulary"]),
        ([-2147483648], ["index 5", "-2147483648"]),
        ([7, MODEL.vocab_size], ["index 5", str(MODEL.vocab_size), f"0 to {MODEL.vocab_size - 1}"]),
        ([7, 2147483647], ["index 5", "2147483647"]),
        ([7] * LIMIT + [-1], ["index 5", "-1"]),  # also where it would be cut off
    ],
    ids=["none", "negative", "smallest", "one too many", "largest", "beyond the limit"],
)
def test_ids_outside_the_vocabulary_are_refused(ids: list[int], words: list[str]) -> None:
    with pytest.raises(BadRequest) as refused:
        fit_ids(OURS, np.array(ids, dtype=np.int32), "end", 5)
    for word in words:
        assert word in str(refused.value)


def test_the_first_and_the_last_id_of_the_vocabulary_are_good() -> None:
    ids = np.array([0, MODEL.vocab_size - 1], dtype=np.int32)
    assert fit_ids(OURS, ids, "none", 0).ids.tolist() == ids.tolist()


def test_ids_beyond_the_limit_may_be_refused_instead() -> None:
    assert fit_ids(OURS, np.arange(LIMIT, dtype=np.int32), "none", 0).dropped == 0
    with pytest.raises(BadRequest, match=r"\(10 tokens\) is longer than .* \(9 tokens\).*index 2"):
        fit_ids(OURS, np.arange(LIMIT + 1, dtype=np.int32), "none", 2)


def test_no_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path, MODEL, None)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"version": "1.0"}'])
def test_a_tokenizer_json_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path, MODEL, None)


def test_a_tokenizer_with_more_ids_than_the_network_has_embeddings(tmp_path: Path) -> None:
    shutil.copy(MINILM / "tokenizer.json", tmp_path)
    small, enough = (dataclasses.replace(MODEL.shape, vocab_size=size) for size in (30521, 30522))
    Tokenizer(tmp_path, dataclasses.replace(MODEL, shape=enough), None)
    with pytest.raises(ConfigError, match=r"30522 tokens, .*config\.json says vocab_size 30521"):
        Tokenizer(tmp_path, dataclasses.replace(MODEL, shape=small), None)


def test_a_tokenizer_that_makes_nothing_of_a_letter(tmp_path: Path) -> None:
    """How many special tokens stand around a text could not be told."""
    fast = FastTokenizer(models.BPE({"t": 0}, []))
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"tokenizer\.json makes no token of the letter a"):
        Tokenizer(tmp_path, model(), None)


def test_an_appended_eos_counts_among_the_special_tokens(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, "[CLS] $A")
    Tokenizer(tmp_path, model(max_tokens=2), None)
    with pytest.raises(ConfigError, match="special tokens alone fill the 2 tokens"):
        Tokenizer(tmp_path, model(max_tokens=2), "[SEP]")


@pytest.mark.parametrize("text", ["", "hello world", "[CLS] typed", "naïve café 👩‍👩‍👧‍👦"])
def test_a_text_is_counted_without_special_tokens(text: str) -> None:
    assert OURS.count(text) == len(THEIRS(text, add_special_tokens=False)["input_ids"])


@settings(deadline=None)
@given(st.text(max_size=60) | st.sampled_from(TEXTS))
def test_a_text_is_cut_in_front_of_the_tokens_that_begin_a_character(text: str) -> None:
    pieces = OURS.pieces(text)
    assert "".join(pieces) == text
    offsets = THEIRS(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = np.cumsum([0, *map(len, pieces[:-1])]).tolist()
    assert all(pieces) or not text
    assert set(starts) - {0} <= {start for start, _ in offsets}
    inside = {place for start, end in offsets for place in range(start + 1, end)}
    assert not inside & set(starts)
    assert len(pieces) >= len({start for start, _ in offsets} - inside)


def test_tokens_that_share_a_character_are_not_parted(tmp_path: Path) -> None:
    """A byte-level tokenizer without the emoji makes four tokens of it."""
    fast = FastTokenizer(models.BPE({byte: i for i, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.save(str(tmp_path / "tokenizer.json"))
    shape = dataclasses.replace(MODEL.shape, vocab_size=256)
    ours = Tokenizer(tmp_path, dataclasses.replace(MODEL, shape=shape), None)
    assert ours.count("a\U0001f642b \u00e9") == 9
    assert ours.pieces("a\U0001f642b \u00e9") == ["a", "\U0001f642", "b", " ", "\u00e9"]


def test_pieces_are_lowercase_where_texts_are(tmp_path: Path) -> None:
    word_tokenizer(tmp_path)
    assert Tokenizer(tmp_path, model(lowercase=True), None).pieces("Big \u0130 w1") == ["big ", "i\u0307 ", "w1"]


@pytest.mark.parametrize("limit", [1, 2])
def test_a_limit_that_special_tokens_alone_fill(limit: int) -> None:
    with pytest.raises(ConfigError, match=rf"tokenizer\.json: special tokens alone fill the {limit} tokens"):
        Tokenizer(MINILM, dataclasses.replace(MODEL, max_tokens=limit), None)
