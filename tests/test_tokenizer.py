"""Tests of Tokenizer: ids and truncation must equal those of transformers' tokenizers.

MiniLM's tokenizer is the real one: its tokenizer.json configures padding and truncation to 128 tokens, which Tokenizer
must switch off.
"""

import dataclasses
import json
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
from triton_embed.python_backend.checkpoint.config import ModelConfig
from triton_embed.python_backend.errors import BadRequest, ConfigError
from triton_embed.python_backend.inputs.row import Row
from triton_embed.python_backend.inputs.tokenizer import Tokenizer
from triton_embed.python_backend.spec import EncoderSpec

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


def truncated_by_transformers(tokenizer: Any, text: str, limit: int, side: str) -> list[int]:
    tokenizer.truncation_side = SIDES[side]
    ids: list[int] = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    return ids


def test_ids_equal_those_of_transformers() -> None:
    for text, ids in zip(TEXTS, OURS.encode(TEXTS), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == THEIRS(text)["input_ids"], text


def test_minilm_file_configures_padding_and_truncation() -> None:
    """Check the assumption of the tests above about this checkpoint."""
    config = json.loads((MINILM / "tokenizer.json").read_text())
    assert config["truncation"]["max_length"] < 400
    assert config["padding"]


@settings(deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_ids_of_any_text_equal_those_of_transformers(texts: list[str]) -> None:
    assert [ids.tolist() for ids in OURS.encode(texts)] == [THEIRS(text)["input_ids"] for text in texts]


@settings(deadline=None)
@given(text=st.text(max_size=30) | st.lists(st.sampled_from(["one", "two", "3", ",", "四"]), max_size=30).map(" ".join))
@pytest.mark.parametrize("side", SIDES)
def test_truncation_equals_that_of_transformers(side: str, text: str) -> None:
    full_ids = THEIRS(text)["input_ids"]
    row = OURS.truncate_text(OURS.encode([text])[0], side, 0)
    assert row.ids.tolist() == truncated_by_transformers(THEIRS, text, LIMIT, side)
    assert row.dropped == len(full_ids) - len(row.ids)


@pytest.mark.parametrize("words", [LIMIT - 3, LIMIT - 2])
@pytest.mark.parametrize("truncate", ["end", "start", "none"])
def test_text_up_to_the_limit_is_not_truncated(truncate: str, words: int) -> None:
    text = "dog " * words
    row = OURS.truncate_text(OURS.encode([text])[0], truncate, 0)
    assert (row.ids.tolist(), row.dropped) == (THEIRS(text)["input_ids"], 0)


def test_too_long_text_is_rejected_with_truncate_none() -> None:
    ids = OURS.encode(["dog " * (LIMIT - 1)])[0]
    with pytest.raises(BadRequest) as error:
        OURS.truncate_text(ids, "none", 3)
    assert str(error.value).startswith("The input (10 tokens) is longer than the model's context length (9 tokens).")
    assert "index 3" in str(error.value)


TEMPLATES = ["$A", "$A [SEP]", "[CLS] $A", "[CLS] [MASK] $A [SEP] [SEP]"]


def word_tokenizer(directory: Path, template: str = "[CLS] $A [SEP]") -> PreTrainedTokenizerFast:
    """Save a word-level tokenizer with this template to `directory`; return it wrapped by transformers."""
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
    network_config = dataclasses.replace(MODEL.network_config, vocab_size=27)
    return dataclasses.replace(MODEL, **{"network_config": network_config, "max_tokens": 6, **changes})


def row_from_ids(tokenizer: Tokenizer, ids: np.ndarray, truncate: str, index: int) -> Row:
    """Check and truncate token ids from a request."""
    return tokenizer.truncate_token_ids(tokenizer.check_ids(ids, index), truncate, index)


@pytest.mark.parametrize("words", [0, 1, 2, 4, 5, 6, 7, 19])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_truncation_preserves_every_special_token(template: str, side: str, words: int, tmp_path: Path) -> None:
    theirs, text = word_tokenizer(tmp_path, template), " ".join(f"w{i}" for i in range(words))
    ours = Tokenizer(tmp_path, model(), None)
    row = ours.truncate_text(ours.encode([text])[0], side, 0)
    assert row.ids.tolist() == truncated_by_transformers(theirs, text, 6, side)
    assert row.dropped == len(theirs(text)["input_ids"]) - len(row.ids)


@pytest.mark.parametrize("words", [0, 1, 3, 4, 5, 6, 19])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("eos", ["[SEP]", "eos_token"])
@pytest.mark.parametrize("template", ["$A", "[CLS] $A", "[CLS] [MASK] $A", "[CLS] $A [SEP]", "$A [MASK] [SEP]"])
def test_every_text_ends_with_exactly_one_eos(template: str, eos: str, side: str, words: int, tmp_path: Path) -> None:
    """Compare with transformers, whose tokenizer adds the EOS token in its post-processor."""
    theirs = word_tokenizer(tmp_path / "theirs", template if template.endswith("[SEP]") else f"{template} [SEP]")
    word_tokenizer(tmp_path / "ours", template)
    ours, text = Tokenizer(tmp_path / "ours", model(), eos), " ".join(f"w{i}" for i in range(words))
    full_ids = ours.encode([text])[0]
    row = ours.truncate_text(full_ids, side, 0)
    assert full_ids.tolist() == theirs(text)["input_ids"]
    assert full_ids.dtype == np.int32
    assert row.ids.tolist() == truncated_by_transformers(theirs, text, 6, side)
    assert row.dropped == len(full_ids) - len(row.ids)


def test_post_processor_that_adds_another_final_token_is_rejected(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, "[CLS] $A [SEP] [MASK]")
    with pytest.raises(ConfigError) as error:
        Tokenizer(tmp_path, model(), "[SEP]")
    assert str(error.value) == (
        f"{tmp_path}: the tokenizer ends texts with '[MASK]', but the model was trained with '[SEP]'"
    )


def test_tokenizer_without_the_eos_token_is_rejected(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, "$A")
    with pytest.raises(ConfigError, match=r"the tokenizer has no token '<\|endoftext\|>', which every text must end"):
        Tokenizer(tmp_path, model(), "<|endoftext|>")


@pytest.mark.parametrize("value", ["[SEP]", {"content": "[SEP]", "__type": "AddedToken"}], ids=["plain", "nested"])
def test_eos_token_may_be_a_string_or_an_object(value: object, tmp_path: Path) -> None:
    theirs = word_tokenizer(tmp_path, "[CLS] $A")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
    ids = Tokenizer(tmp_path, model(), "eos_token").encode(["w1"])[0]
    assert ids.tolist() == [*theirs("w1")["input_ids"], 3]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "tokenizer_config.json is missing"),
        ("{}", "tokenizer_config.json: 'eos_token' is missing"),
        ('{"eos_token": null}', "tokenizer_config.json: 'eos_token' is missing"),
        ('{"eos_token": 7}', "tokenizer_config.json: eos_token is 7; expected type str or dict"),
        ('{"eos_token": {"lstrip": false}}', "tokenizer_config.json: eos_token: 'content' is missing"),
        ('{"eos_token": "</s>"}', "the tokenizer has no token '</s>'"),
    ],
)
def test_missing_or_invalid_eos_token_is_an_error(config: str | None, message: str, tmp_path: Path) -> None:
    word_tokenizer(tmp_path, "$A")
    (tmp_path / "tokenizer_config.json").unlink()
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ConfigError) as error:
        Tokenizer(tmp_path, model(), "eos_token")
    assert message in str(error.value)


def test_text_is_lowercased_only_if_configured(tmp_path: Path) -> None:
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
def test_truncation_of_ids_keeps_the_pooled_id(
    pooling: str, truncate: str, expected: list[int], tmp_path: Path
) -> None:
    word_tokenizer(tmp_path)
    ours = Tokenizer(tmp_path, model(pooling=pooling, max_tokens=4), None)
    row = row_from_ids(ours, np.arange(10, 16, dtype=np.int32), truncate, 0)
    assert (row.ids.tolist(), row.dropped) == (expected, 2)


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, MODEL.vocab_size - 1), min_size=1, max_size=3 * LIMIT),
    truncate=st.sampled_from(["end", "start"]),
)
def test_ids_within_the_limit_are_used_unchanged(ids: list[int], truncate: str) -> None:
    row = row_from_ids(OURS, np.array(ids, dtype=np.int32), truncate, 0)
    assert len(row.ids) == min(len(ids), LIMIT)
    assert row.dropped == len(ids) - len(row.ids)
    expected = ids[: len(row.ids)] if truncate == "end" else ids[-len(row.ids) :]
    assert row.ids.tolist() == expected


@pytest.mark.parametrize(
    ("ids", "fragments"),
    [
        ([], ["index 5 cannot be empty"]),
        ([7, -1, 7], ["index 5", "-1", "vocabulary"]),
        ([-2147483648], ["index 5", "-2147483648"]),
        ([7, MODEL.vocab_size], ["index 5", str(MODEL.vocab_size), f"0 to {MODEL.vocab_size - 1}"]),
        ([7, 2147483647], ["index 5", "2147483647"]),
        ([7] * LIMIT + [-1], ["index 5", "-1"]),  # checked even if truncation would drop it
    ],
    ids=["none", "negative", "smallest", "one too many", "largest", "beyond the limit"],
)
def test_ids_outside_the_vocabulary_are_rejected(ids: list[int], fragments: list[str]) -> None:
    with pytest.raises(BadRequest) as error:
        row_from_ids(OURS, np.array(ids, dtype=np.int32), "end", 5)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_first_and_last_id_of_the_vocabulary_are_accepted() -> None:
    ids = np.array([0, MODEL.vocab_size - 1], dtype=np.int32)
    assert row_from_ids(OURS, ids, "none", 0).ids.tolist() == ids.tolist()


def test_too_many_ids_are_rejected_with_truncate_none() -> None:
    assert row_from_ids(OURS, np.arange(LIMIT, dtype=np.int32), "none", 0).dropped == 0
    with pytest.raises(BadRequest, match=r"\(10 tokens\) is longer than .* \(9 tokens\).*index 2"):
        row_from_ids(OURS, np.arange(LIMIT + 1, dtype=np.int32), "none", 2)


def test_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} has no tokenizer: none of tokenizer.json, vocab.txt, "):
        Tokenizer(tmp_path, MODEL, None)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"version": "1.0"}'])
def test_invalid_tokenizer_json_is_an_error(text: str, tmp_path: Path) -> None:
    word_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=f"{tmp_path}: transformers cannot load the tokenizer: "):
        Tokenizer(tmp_path, MODEL, None)


def test_token_without_an_embedding_is_rejected_where_it_occurs(tmp_path: Path) -> None:
    """Test a network without an embedding for the last token, which is `big`."""
    word_tokenizer(tmp_path)
    small = dataclasses.replace(MODEL.network_config, vocab_size=26)
    ours = Tokenizer(tmp_path, model(network_config=small), None)
    for words, rejected in (("w1 Big", False), ("w1 big", True), ("w1 w2 w3 w4 big", False)):  # the last is cut off
        (ids,) = ours.encode([words])
        if rejected:
            with pytest.raises(BadRequest, match=r"index 3 has token id 26, which is outside .* \(0 to 25\)"):
                ours.truncate_text(ids, "end", 3)
        else:
            assert ours.truncate_text(ids, "end", 3).ids.max() < 26


def test_tokenizer_without_a_token_for_a_letter_is_rejected(tmp_path: Path) -> None:
    """Reject a tokenizer for which the number of special tokens around a text is unknown."""
    fast = FastTokenizer(models.BPE({"t": 0}, []))
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the tokenizer produces no token for the letter 'a'"):
        Tokenizer(tmp_path, model(), None)


def test_appended_eos_counts_as_a_special_token(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, "[CLS] $A")
    Tokenizer(tmp_path, model(max_tokens=2), None)
    with pytest.raises(ConfigError, match="special tokens alone fill the maximum length of 2 tokens"):
        Tokenizer(tmp_path, model(max_tokens=2), "[SEP]")


@pytest.mark.parametrize("text", ["", "hello world", "[CLS] typed", "naïve café 👩‍👩‍👧‍👦"])
def test_token_count_excludes_special_tokens(text: str) -> None:
    assert OURS.count_tokens(text) == len(THEIRS(text, add_special_tokens=False)["input_ids"])


@settings(deadline=None)
@given(st.text(max_size=60) | st.sampled_from(TEXTS))
def test_text_is_split_before_tokens_that_start_a_character(text: str) -> None:
    pieces = OURS.split_at_tokens(text)
    assert "".join(pieces) == text
    offsets = THEIRS(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = np.cumsum([0, *map(len, pieces[:-1])]).tolist()
    assert all(pieces) or not text
    assert set(starts) - {0} <= {start for start, _ in offsets}
    inner_offsets = {offset for start, end in offsets for offset in range(start + 1, end)}
    assert not inner_offsets & set(starts)
    assert len(pieces) >= len({start for start, _ in offsets} - inner_offsets)


def test_tokens_of_one_character_are_not_separated(tmp_path: Path) -> None:
    """Test a byte-level tokenizer without merges, which encodes an emoji as four tokens."""
    fast = FastTokenizer(models.BPE({byte: i for i, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(tmp_path)
    network_config = dataclasses.replace(MODEL.network_config, vocab_size=256)
    ours = Tokenizer(tmp_path, dataclasses.replace(MODEL, network_config=network_config), None)
    assert ours.count_tokens("a\U0001f642b \u00e9") == 9
    assert ours.split_at_tokens("a\U0001f642b \u00e9") == ["a", "\U0001f642", "b", " ", "\u00e9"]


def test_split_text_keeps_its_case(tmp_path: Path) -> None:
    """Split the text itself where its lowercase form has tokens: a lowercased \u0130 is two characters."""
    word_tokenizer(tmp_path)
    pieces = Tokenizer(tmp_path, model(lowercase=True), None).split_at_tokens("Big \u0130 w1")
    assert pieces == ["Big ", "\u0130 ", "w1"]


@pytest.mark.parametrize("limit", [1, 2])
def test_limit_filled_by_special_tokens_is_rejected(limit: int) -> None:
    with pytest.raises(ConfigError, match=rf"special tokens alone fill the maximum length of {limit} tokens"):
        Tokenizer(MINILM, dataclasses.replace(MODEL, max_tokens=limit), None)
