"""Tests of the processors: exact templates, special tokens, image tokens and length limits of rows.

The expected ids come from transformers: from AutoTokenizer for texts, and from the token counts of its image processor
for images. Tests of Tokenizer alone are in test_tokenizer.py.
"""

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from checkpoints import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sentence_transformers import SentenceTransformer
from test_ops import one_thread  # noqa: F401 - applies to every test here
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from conftest import MINILM, Family
from triton_embed.python_backend.errors import BadRequest, ConfigError
from triton_embed.python_backend.inputs.parameters import Item
from triton_embed.python_backend.inputs.row import Row

Tiny = Callable[[str], Family]
TASK = "Given a web search query, retrieve relevant passages that answer the query"
BGE, XLM, E5, LLAMA = "bge-bert-cls", "bge-m3", "e5_mistral-mistral-window", "e5_mistral-llama-yarn"
GTE, QWEN3, GME = "gte_qwen2-bidirectional", "qwen3_embedding-bare", "gme_qwen2_vl-hub"
CLIP_OLD, CLIP_NEW = (
    "clip-openai-extra-token",
    "clip-new-extra-token",
)  # the two rules that locate the end-of-text token
SIDES = {"end": "right", "start": "left"}
GME_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
GME_TAIL = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


def family_with(tiny: Tiny, name: str, **parameters: object) -> Family:
    """Load a tiny checkpoint with additional config.pbtxt parameters."""
    case = next(case for case in CASES if case.name == name)
    values = {key: str(value) for key, value in parameters.items()}
    return Family(case.family, tiny(name).directory, **{**case.parameters, **values})


def copy_checkpoint(tiny: Tiny, name: str, directory: Path, **files: Mapping[str, Any]) -> Path:
    """Copy a tiny checkpoint and set keys in some of its JSON files."""
    shutil.copytree(tiny(name).directory, directory)
    for stem, values in files.items():
        file = directory / f"{stem}.json"
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**content, **values}))
    return directory


def family_with_prompts(tiny: Tiny, name: str, directory: Path, prompts: Mapping[str, str]) -> Family:
    """Load a copy of a tiny checkpoint that defines exactly these prompts."""
    copy_checkpoint(tiny, name, directory, config_sentence_transformers={"prompts": prompts})
    return Family(next(case.family for case in CASES if case.name == name), directory)


def png(width: int, height: int, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def open_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def ids_of(family: Family, text: str) -> list[int]:
    """Encode a text with AutoTokenizer, including special tokens."""
    ids: list[int] = AutoTokenizer.from_pretrained(family.directory)(text)["input_ids"]
    return ids


# Templates

FIND = {"instruction": "Find it."}
E5_PROMPTS = {"web_search_query": f"Instruct: {TASK}\nQuery: ", "sts_query": "Instruct: Find the same.\nQuery: "}
QWEN3_PROMPTS = {"query": f"Instruct: {TASK}\nQuery:", "document": ""}
# checkpoint, its prompts, parameters of the request, expected text for "hello world"
TEMPLATED: list[tuple[str, dict[str, str], dict[str, str], str]] = [
    (BGE, {}, {}, "hello world"),
    (BGE, {}, {"instruction": "Find: "}, "Find: hello world"),
    (BGE, {}, {"prompt_name": "query"}, "Represent this sentence for searching relevant passages: hello world"),
    (BGE, {}, {"prompt_name": "document"}, "hello world"),
    (XLM, {"query": "query: ", "passage": "passage: "}, {"prompt_name": "passage"}, "passage: hello world"),
    (XLM, {"query": "query: ", "passage": "passage: "}, {"prompt_name": "query"}, "query: hello world"),
    (E5, E5_PROMPTS, {}, "hello world"),
    (E5, E5_PROMPTS, FIND, "Instruct: Find it.\nQuery: hello world"),
    (E5, E5_PROMPTS, {"prompt_name": "web_search_query"}, f"Instruct: {TASK}\nQuery: hello world"),
    (E5, E5_PROMPTS, {"prompt_name": "sts_query"}, "Instruct: Find the same.\nQuery: hello world"),
    (LLAMA, {}, {"prompt_name": "query"}, f"Instruct: {TASK}\nQuery: hello world"),
    (LLAMA, {}, {"prompt_name": "document"}, "hello world"),
    (GTE, {}, {}, "hello world"),
    (GTE, {}, FIND, "Instruct: Find it.\nQuery: hello world"),
    (GTE, {}, {"prompt_name": "query"}, f"Instruct: {TASK}\nQuery: hello world"),
    (GTE, {"query": "Q: "}, {"prompt_name": "query"}, "Q: hello world"),
    (QWEN3, {}, {}, "hello world"),
    (QWEN3, {}, FIND, "Instruct: Find it.\nQuery:hello world"),
    (QWEN3, {}, {"prompt_name": "query"}, f"Instruct: {TASK}\nQuery:hello world"),
    (QWEN3, QWEN3_PROMPTS, {"prompt_name": "query"}, f"Instruct: {TASK}\nQuery:hello world"),
    (QWEN3, QWEN3_PROMPTS, {"prompt_name": "document"}, "hello world"),
    (GME, {}, {}, f"{GME_SYSTEM}hello world{GME_TAIL}"),
    (
        GME,
        {},
        FIND,
        "<|im_start|>system\nFind it.<|im_end|>\n<|im_start|>user\nhello world<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>",
    ),
    (
        GME,
        {"query": "Find an image."},
        {"prompt_name": "query"},
        "<|im_start|>system\nFind an image.<|im_end|>\n<|im_start|>user\nhello world<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>",
    ),
    (CLIP_OLD, {}, {}, "hello world"),
    # Placeholders in an instruction from the request are not replaced.
    (BGE, {}, {"instruction": "{text}{instruction}"}, "{text}{instruction}hello world"),
    (E5, {}, {"instruction": "{text}"}, "Instruct: {text}\nQuery: hello world"),
    (QWEN3, {}, {"instruction": "\\1 {} %s {0}"}, "Instruct: \\1 {} %s {0}\nQuery:hello world"),
    (E5, {}, {"instruction": ""}, "hello world"),
    (LLAMA, {}, {"prompt_name": ""}, "hello world"),
    (QWEN3, QWEN3_PROMPTS, {"prompt_name": ""}, "hello world"),
    (GME, {}, {"prompt_name": ""}, f"{GME_SYSTEM}hello world{GME_TAIL}"),
]


@pytest.mark.parametrize(("name", "prompts", "parameters", "expected"), TEMPLATED)
def test_template_equals_the_training_format_of_the_family(
    name: str, prompts: dict[str, str], parameters: dict[str, str], expected: str, tiny: Tiny, tmp_path: Path
) -> None:
    processor = family_with_prompts(tiny, name, tmp_path / "named", prompts).processor
    assert processor.template(parameters)(Item("hello world")) == expected


@pytest.mark.parametrize("text", ["{text}", "{instruction} {images}", " leading", "trailing \n"])
def test_placeholders_in_a_text_are_not_replaced(text: str, tiny: Tiny) -> None:
    assert tiny(E5).processor.template({"instruction": "x"})(Item(text)) == f"Instruct: x\nQuery: {text}"
    assert tiny(GME).processor.template({})(Item(text)) == f"{GME_SYSTEM}{text}{GME_TAIL}"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_gme_images_precede_the_text(count: int, tiny: Tiny) -> None:
    template = tiny(GME).processor.template({})
    assert template(Item("hello", (b"x",) * count)) == f"{GME_SYSTEM}{VISION * count}hello{GME_TAIL}"
    assert template(Item("", (b"x",) * count)) == f"{GME_SYSTEM}{VISION * count}{GME_TAIL}"


def test_checkpoint_prompts_equal_those_of_sentence_transformers(tiny: Tiny, tmp_path: Path) -> None:
    family = family_with_prompts(tiny, QWEN3, tmp_path / "named", {**QWEN3_PROMPTS, "odd": " {text} "})
    theirs = SentenceTransformer(str(family.directory), device="cpu").prompts
    assert family.processor.prompt_names == list(theirs)
    for name, prompt in theirs.items():
        assert family.processor.template({"prompt_name": name})(Item("hello")) == f"{prompt}hello"


DEFAULT_PROMPTS: list[tuple[str, dict[str, str], str]] = [
    (XLM, {"query": "the cat sat: ", "odd": "a dog: "}, "odd"),
    (XLM, {"query": "the cat sat: "}, "query"),
    (XLM, {"query": "the cat sat: "}, "document"),
    (XLM, {}, "query"),
    (QWEN3, QWEN3_PROMPTS, "query"),
    (QWEN3, QWEN3_PROMPTS, "document"),
]


@pytest.mark.parametrize(("name", "prompts", "default"), DEFAULT_PROMPTS)
def test_default_prompt_equals_that_of_sentence_transformers(
    name: str, prompts: dict[str, str], default: str, tiny: Tiny, tmp_path: Path
) -> None:
    values = {"prompts": prompts, "default_prompt_name": default}
    directory = copy_checkpoint(tiny, name, tmp_path / "named", config_sentence_transformers=values)
    family = Family(next(case.family for case in CASES if case.name == name), directory)
    theirs = SentenceTransformer(str(directory), device="cpu")
    requests: list[tuple[dict[str, str], dict[str, str]]] = [
        ({}, {}),
        ({"prompt_name": ""}, {"prompt": ""}),
        ({"instruction": ""}, {"prompt": ""}),
        *(({"prompt_name": other}, {"prompt_name": other}) for other in prompts),
    ]
    for ours, equivalent in requests:
        row = family.rows(Item("hello world"), **ours)
        vector = family.embedder.embed(row, [family.model.dimensions])
        expected = theirs.encode(["hello world"], normalize_embeddings=True, **equivalent)
        assert np.abs(vector - expected).max() <= 2e-5, ours
    difference = theirs.encode("hello world", prompt="") - theirs.encode("hello world")
    assert (np.abs(difference).max() > 1e-3) == bool(prompts.get(default))


def test_query_instruction_of_the_operator_replaces_missing_prompts(tiny: Tiny, tmp_path: Path) -> None:
    chinese = "为这个句子生成表示以用于检索相关文章："
    directory = family_with_prompts(tiny, BGE, tmp_path / "unnamed", {}).directory
    processor = Family("bge", directory, query_instruction=chinese).processor
    assert processor.prompt_names == ["query", "document"]
    assert processor.template({"prompt_name": "query"})(Item("北京")) == f"{chinese}北京"


@pytest.mark.parametrize(
    ("name", "prompts", "parameters", "message"),
    [
        ("minilm", {}, {"instruction": "x"}, "Model 'minilm' takes no instruction: it was trained without one"),
        (CLIP_OLD, {}, {"instruction": "x"}, "Model 'clip' takes no instruction: it was trained without one"),
        (E5, {}, {"instruction": "x" * 65_537}, "instruction has 65537 characters, more than 65536"),
        ("minilm", {}, {"prompt_name": "query"}, "Model 'minilm' has no prompt_name 'query'; it has: none"),
        (CLIP_OLD, {}, {"prompt_name": "query"}, "Model 'clip' has no prompt_name 'query'; it has: none"),
        (GME, {}, {"prompt_name": "query"}, "Model 'gme_qwen2_vl' has no prompt_name 'query'; it has: none"),
        (BGE, {}, {"prompt_name": "Query"}, "Model 'bge' has no prompt_name 'Query'; it has: query, document"),
        (QWEN3, {}, {"prompt_name": "", "instruction": "x"}, "Send either instruction or prompt_name"),
        # If the checkpoint defines prompts, only those are available.
        (
            E5,
            E5_PROMPTS,
            {"prompt_name": "query"},
            "Model 'e5_mistral' has no prompt_name 'query'; it has: web_search_query, sts_query",
        ),
        (QWEN3, {}, {"prompt_name": "query", "instruction": "x"}, "Send either instruction or prompt_name"),
        (GME, {}, {"prompt_name": "query", "instruction": ""}, "Send either instruction or prompt_name"),
    ],
)
def test_unavailable_prompt_is_rejected(
    name: str, prompts: dict[str, str], parameters: dict[str, str], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    family = (
        Family("minilm", MINILM) if name == "minilm" else family_with_prompts(tiny, name, tmp_path / "named", prompts)
    )
    with pytest.raises(BadRequest) as error:
        family.processor.template(parameters)
    assert str(error.value) == message


# Special tokens

LONG = " ".join(["the cat sat on the mat, hello world"] * 30)
ENDS = {E5: "</s>", LLAMA: "</s>", GTE: "<|endoftext|>", QWEN3: "<|endoftext|>"}
STARTS = {E5: ["<s>"], LLAMA: ["<s>"], GTE: [], QWEN3: []}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ENDS)
def test_decoder_texts_of_any_length_end_with_exactly_one_eos(name: str, side: str, tiny: Tiny) -> None:
    family, limit = family_with(tiny, name, max_tokens=17), 17
    tokenizer = AutoTokenizer.from_pretrained(family.directory)
    (eos,) = tokenizer.convert_tokens_to_ids([ENDS[name]])
    start = tokenizer.convert_tokens_to_ids(STARTS[name])
    body = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    room = limit - 1 - len(start)
    for text, body_part in (("hello", None), (LONG, body[:room] if side == "end" else body[-room:])):
        (row,) = family.rows(Item(text), truncate=side)
        assert row.ids.tolist().count(eos) == 1
        assert row.ids[-1] == eos
        if body_part is None:
            assert row.ids.tolist() == [*start, *tokenizer(text, add_special_tokens=False)["input_ids"], eos]
            assert row.dropped == 0
        else:
            assert row.ids.tolist() == [*start, *body_part, eos]
            assert row.dropped == len(body) - room


def test_eos_of_the_qwen3_post_processor_is_not_duplicated(tiny: Tiny) -> None:
    """Compare with transformers, whose tokenizer also adds the EOS token in the post-processor."""
    (row,) = tiny(QWEN3).rows(Item("hello world"))
    plain = AutoTokenizer.from_pretrained(tiny(QWEN3).directory)("hello world", add_special_tokens=False)
    assert row.ids.tolist() == ids_of(tiny(QWEN3), "hello world")
    assert row.ids[:-1].tolist() == plain["input_ids"]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [BGE, XLM])
def test_truncation_preserves_cls_and_sep(name: str, side: str, tiny: Tiny) -> None:
    family = family_with(tiny, name, max_tokens=11)
    tokenizer = AutoTokenizer.from_pretrained(family.directory, truncation_side=SIDES[side])
    (row,) = family.rows(Item(LONG), truncate=side)
    assert row.ids.tolist() == tokenizer(LONG, truncation=True, max_length=11)["input_ids"]
    assert [row.ids[0], row.ids[-1]] == [tokenizer.cls_token_id, tokenizer.sep_token_id]


INSTRUCTED = {
    BGE: "Represent this sentence for searching: ",
    XLM: "find what the cat said",  # no trailing space: the last word may merge with the text
    E5: "Instruct: Find it.\nQuery: ",
    LLAMA: "Instruct: Find it.\nQuery: ",
    GTE: "Instruct: Find it.\nQuery: ",
    QWEN3: "Instruct: Find it.\nQuery:",
}


@pytest.mark.parametrize(
    "text", [LONG, "\u4f60\u597d" * 60, LONG.replace(" ", " \n  ")], ids=["words", "Chinese", "spaces"]
)
@pytest.mark.parametrize("name", INSTRUCTED)
def test_truncation_at_the_start_preserves_the_prompt(name: str, text: str, tiny: Tiny) -> None:
    """Check that every token stays whose offsets lie entirely inside the prompt."""
    prompt, limit = INSTRUCTED[name], 40
    family = family_with(tiny, name, max_tokens=limit)
    plain = name in (BGE, XLM)
    parameters = {"instruction": prompt if plain else "Find it."}
    tokenizer = AutoTokenizer.from_pretrained(family.directory)
    encoded = tokenizer(prompt + text, return_offsets_mapping=True, add_special_tokens=False)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    head = next(i for i, end in enumerate(ends) if end > len(prompt))
    before = [tokenizer.cls_token_id] if plain else tokenizer.convert_tokens_to_ids(STARTS[name])
    after = [tokenizer.sep_token_id] if plain else tokenizer.convert_tokens_to_ids([ENDS[name]])
    room = limit - len(before) - head - len(after)
    assert 0 < room < len(ids) - head
    (row,) = family.rows(Item(text), truncate="start", **parameters)
    assert row.ids.tolist() == [*before, *ids[:head], *ids[-room:], *after]
    assert row.dropped == len(ids) - head - room


@pytest.mark.parametrize("name", INSTRUCTED)
def test_prompt_that_fills_the_limit_is_rejected(name: str, tiny: Tiny) -> None:
    family = family_with(tiny, name, max_tokens=12)
    with pytest.raises(BadRequest, match=r"Input at index 0: images and instruction take .* tokens"):
        family.rows(Item(LONG), truncate="start", instruction="find the cat " * 4)


def set_post_processor(directory: Path, template: str, *tokens: str) -> None:
    file = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    specials = [(token, tokenizer.token_to_id(token)) for token in tokens]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    tokenizer.save(file)


@pytest.mark.parametrize(
    ("name", "family", "actual", "expected"),
    [
        (QWEN3, "qwen3_embedding", "<|im_end|>", "<|endoftext|>"),
        (GTE, "gte_qwen2", "<|im_end|>", "<|endoftext|>"),
        (E5, "e5_mistral", "<unk>", "</s>"),
    ],
)
def test_checkpoint_with_another_final_token_is_rejected(
    name: str, family: str, actual: str, expected: str, tiny: Tiny, tmp_path: Path
) -> None:
    directory = copy_checkpoint(tiny, name, tmp_path / "other")
    set_post_processor(directory, f"$A {actual}", actual)
    with pytest.raises(ConfigError) as error:
        Family(family, directory)
    assert str(error.value) == (
        f"{directory}: the tokenizer ends texts with '{actual}', but the model was trained with '{expected}'"
    )


def test_eos_of_the_post_processor_is_not_added_again(tiny: Tiny, tmp_path: Path) -> None:
    """Test a post-processor like that of files saved with add_eos_token."""
    directory = copy_checkpoint(tiny, E5, tmp_path / "e5")
    set_post_processor(directory, "<s> $A </s>", "<s>", "</s>")
    (row,), (plain,) = (family.rows(Item("hello")) for family in (Family("e5_mistral", directory), tiny(E5)))
    assert row.ids.tolist() == plain.ids.tolist()


@pytest.mark.parametrize(
    ("name", "family", "config", "message"),
    [
        (E5, "e5_mistral", {"eos_token": "<end>"}, "has no token '<end>', which every text must end with"),
        (E5, "e5_mistral", {"eos_token": None}, "tokenizer_config.json: 'eos_token' is missing"),
    ],
)
def test_checkpoint_without_the_eos_token_is_rejected(
    name: str, family: str, config: dict[str, Any], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    directory = copy_checkpoint(tiny, name, tmp_path / "other", tokenizer_config=config)
    with pytest.raises(ConfigError) as error:
        Family(family, directory)
    assert message in str(error.value)


def test_tokenizer_without_endoftext_is_rejected(tiny: Tiny, tmp_path: Path) -> None:
    directory = copy_checkpoint(tiny, GTE, tmp_path / "gte")
    file = directory / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|another|>"))
    with pytest.raises(ConfigError, match=r"has no token '<\|endoftext\|>'"):
        Family("gte_qwen2", directory)


# Unsupported items

EMPTY = "Input at index 0 cannot be empty or whitespace only"
NO_IMAGES = "takes no images (input at index 0)"


@pytest.mark.parametrize(
    ("name", "item", "message"),
    [
        *((name, Item(), EMPTY) for name in (BGE, E5, GTE, QWEN3, CLIP_OLD, GME)),
        *((name, Item("", (b"x",)), NO_IMAGES) for name in (BGE, E5, GTE, QWEN3)),
        *((name, Item("a cat", (b"x",)), NO_IMAGES) for name in (BGE, QWEN3)),
        (
            CLIP_OLD,
            Item("a cat", (b"x",)),
            "Model 'clip' embeds a text or an image, not both together (input at index 0)",
        ),
        (CLIP_OLD, Item("", (b"x", b"y")), "Model 'clip' embeds one image at a time (input at index 0)"),
    ],
)
def test_unsupported_item_is_rejected(name: str, item: Item, message: str, tiny: Tiny) -> None:
    with pytest.raises(BadRequest) as error:
        tiny(name).rows(item)
    assert message in str(error.value)


def test_error_names_the_index_of_the_item(tiny: Tiny) -> None:
    with pytest.raises(BadRequest, match=r"\(input at index 2\)"):
        tiny(CLIP_OLD).rows(Item("a"), Item("", (png(9, 9),)), Item("b", (png(9, 9),)))
    with pytest.raises(BadRequest, match="Input at index 1 has an image that cannot be read"):
        tiny(GME).rows(Item("a"), Item("b", (png(9, 9), b"GIF89a")))


def test_modalities(tiny: Tiny) -> None:
    modalities = {name: tiny(name).processor.modalities for name in (BGE, E5, CLIP_OLD, GME)}
    assert modalities == {
        BGE: ("text",),
        E5: ("text",),
        CLIP_OLD: ("text", "image"),
        GME: ("text", "image", "text+image"),
    }


# CLIP


def clip_ids(family: Family) -> tuple[int, int, int]:
    """Return the ids of <|startoftext|>, of <|endoftext|> and of a token with a higher id."""
    tokenizer = AutoTokenizer.from_pretrained(family.directory)
    start, end, extra = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>", "<cat-toy>"])
    assert start < end < extra
    return start, end, extra


def ids_row(family: Family, ids: Sequence[int], truncate: str = "end", index: int = 0) -> Row:
    return family.processor.row_from_ids(np.array(ids, dtype=np.int32), truncate, index)


@pytest.mark.parametrize("name", [CLIP_OLD, CLIP_NEW])
def test_end_of_text_is_located_like_transformers(name: str, tiny: Tiny) -> None:
    family = tiny(name)
    start, end, extra = clip_ids(family)
    ids_of_rows = [
        [start, 5, 6, end],
        [start, 5, end, end, end],  # padded like OpenAI's tokenizer
        [start, 5, end, 7, 8, 0, 0],
        [end, 5, 6],
        [start, extra, 5, end],
        [start, 5, end, 9, extra, 4],
        [start, extra, extra, 5, end, extra],
        [extra, end],
    ]
    rows = [ids_row(family, ids) for ids in ids_of_rows]
    assert any(len(row.ids) < len(ids) for row, ids in zip(rows, ids_of_rows, strict=True))
    vectors = family.embedder.embed(rows, [28] * len(ids_of_rows))
    assert np.abs(vectors - oracles.clip_text_vectors(family.directory, ids_of_rows)).max() <= 2e-5


TYPED_TEXTS = {
    "last": "a photo of a <cat-toy>",
    "first": "<cat-toy> on a hill",
    "typed": "a <|endoftext|> cat",
    "long": "a cat " * 60,
    "beyond the limit": "cat " * 99 + "<cat-toy>",
    "typed in a long one": "cat " * 40 + "<|endoftext|>" + " dog" * 60,
}


@pytest.mark.parametrize("name", [CLIP_OLD, CLIP_NEW])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", TYPED_TEXTS.values(), ids=list(TYPED_TEXTS))
def test_clip_text_is_truncated_and_pooled_like_transformers(text: str, side: str, name: str, tiny: Tiny) -> None:
    """Check that truncation comes first: an end-of-text token beyond the limit has no effect."""
    family = tiny(name)
    tokenizer = AutoTokenizer.from_pretrained(family.directory, truncation_side=SIDES[side])
    ids = tokenizer(text, truncation=True, max_length=77)["input_ids"]
    vector = family.embedder.embed(family.rows(Item(text), truncate=side), [28])
    assert np.abs(vector - oracles.clip_text_vectors(family.directory, [ids])).max() <= 2e-5


def test_clip_ids_without_end_of_text_are_rejected(tiny: Tiny) -> None:
    """Reject them, because transformers would pool the first token, which attends to no other token."""
    start, end, _ = clip_ids(tiny(CLIP_NEW))
    with pytest.raises(BadRequest) as error:
        ids_row(tiny(CLIP_NEW), [start, 5, 6], index=4)
    assert str(error.value) == (f"Input at index 4 has no end-of-text token ({end}); the model pools at that token")
    ids = [start, 5, 6]
    vector = tiny(CLIP_OLD).embedder.embed([ids_row(tiny(CLIP_OLD), ids)], [28])  # pools at the highest id
    assert np.abs(vector - oracles.clip_text_vectors(tiny(CLIP_OLD).directory, [ids])).max() <= 2e-5


@pytest.mark.parametrize("name", [CLIP_OLD, CLIP_NEW])
@pytest.mark.parametrize("truncate", SIDES)
def test_truncation_of_clip_ids_keeps_the_end_of_text(name: str, truncate: str, tiny: Tiny) -> None:
    start, end, _ = clip_ids(tiny(name))
    ids = [start, *range(5, 95), end, 3, 3]
    row = ids_row(tiny(name), ids, truncate)
    assert row.ids.tolist() == ([start, *range(5, 80), end] if truncate == "end" else [*range(19, 95), end])
    assert row.dropped == 15
    with pytest.raises(BadRequest, match=r"\(92 tokens\) is longer than .* \(77 tokens\)"):
        ids_row(tiny(name), ids, "none")


def test_clip_ids_outside_the_vocabulary_are_rejected(tiny: Tiny) -> None:
    _, end, extra = clip_ids(tiny(CLIP_NEW))
    with pytest.raises(BadRequest, match=f"index 0 has token id {extra + 1}"):
        ids_row(tiny(CLIP_NEW), [extra + 1, end])


def test_clip_image_is_a_row_without_ids(tiny: Tiny) -> None:
    family = tiny(CLIP_OLD)
    text, image = family.rows(Item("a cat"), Item("", (png(90, 60),)))
    tokens = oracles.clip_image_tokens(family.directory)
    assert (len(image.ids), image.tokens, image.cost, image.dropped) == (0, tokens, tokens, 0)
    assert image.images[0].shape == (48, 48, 3)
    assert (text.tokens, text.cost, text.images) == (len(text.ids), len(text.ids), ())
    assert not family.processor.has_ids(Item("", (b"x",)))
    assert family.processor.has_ids(Item("a"))


# GME

SIZES = ((60, 40), (24, 130), (150, 37), (48, 48), (9, 33), (200, 180))
GME_ITEMS: list[dict[str, Any]] = [
    {"text": "hello world", "images": []},
    {"text": "", "images": [0]},
    {"text": "the cat", "images": [1]},
    {"text": "the cat", "images": [2, 3]},
    {"text": "", "images": [5, 4, 0]},
    {"text": "hello\n\nworld", "images": [3, 3, 3]},
    {"text": "\n", "images": [2], "instruction": "Find an image."},
    {"text": " 你好", "images": [], "instruction": "Find an image."},
]


@pytest.mark.parametrize("name", [GME, "gme_qwen2_vl-sequential-fp16"])
@pytest.mark.parametrize("item_index", range(len(GME_ITEMS)))
def test_image_token_count_equals_that_of_transformers(item_index: int, name: str, tiny: Tiny) -> None:
    family, item = tiny(name), GME_ITEMS[item_index]
    files = [png(*SIZES[i], seed=i) for i in item["images"]]
    limits = (family.serving.min_image_tokens, family.serving.max_image_tokens)
    request = {**item, "images": [open_image(file) for file in files]}
    (theirs,) = oracles.gme_inputs(family.directory, [request], *limits)
    parameters = {"instruction": item["instruction"]} if "instruction" in item else {}
    (row,) = family.rows(Item(item["text"], tuple(files)), **parameters)
    patches = len(theirs["pixel_values"]) if files else 0
    assert row.ids.tolist() == theirs["input_ids"][0].tolist()
    assert (row.tokens, row.vision_tokens, row.cost) == (len(row.ids), patches, len(row.ids) + patches)
    assert row.dropped == 0
    sides = [(image.shape[0] // 14, image.shape[1] // 14) for image in row.images]  # in the order of the request
    assert sides == [tuple(grid[1:].tolist()) for grid in theirs.get("image_grid_thw", ())]


@pytest.mark.parametrize("files", [(), (png(60, 40),), (png(60, 40), png(40, 60))], ids=len)
@pytest.mark.parametrize("location", ["text", "instruction"])
def test_image_token_in_a_text_is_rejected(location: str, files: tuple[bytes, ...], tiny: Tiny) -> None:
    """Reject the token: it would be replaced by an image, or represent a missing image."""
    text, parameters = ("<|image_pad|>", {}) if location == "text" else ("a", {"instruction": "x<|image_pad|>"})
    with pytest.raises(BadRequest) as error:
        tiny(GME).rows(Item("good"), Item(text, files), **parameters)
    assert str(error.value).endswith("has <|image_pad|> in its text, which is reserved for images")


def test_gme_ids_with_the_image_token_are_rejected(tiny: Tiny) -> None:
    family = tiny(GME)
    (image,) = AutoTokenizer.from_pretrained(family.directory).convert_tokens_to_ids(["<|image_pad|>"])
    with pytest.raises(BadRequest) as error:
        ids_row(family, [1, image, 2], index=3)
    assert str(error.value) == (
        f"Input at index 3 has token id {image}, which is reserved for images; send the image itself"
    )
    assert ids_row(family, [1, image - 1, 2]).ids.tolist() == [1, image - 1, 2]


def test_truncation_of_gme_ids_keeps_the_last_id(tiny: Tiny) -> None:
    row = ids_row(family_with(tiny, GME, max_tokens=6), list(range(10)))
    assert (row.ids.tolist(), row.dropped) == ([0, 1, 2, 3, 4, 9], 4)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("instruction", [None, "Find an image that shows what the text says."])
def test_truncation_preserves_head_images_and_tail(instruction: str | None, side: str, count: int, tiny: Tiny) -> None:
    limit = 84
    family, files = family_with(tiny, GME, max_tokens=limit), tuple(png(60, 40, seed=i) for i in range(count))
    request = {"text": LONG, "images": [open_image(file) for file in files], "instruction": instruction}
    (theirs,) = oracles.gme_inputs(family.directory, [request], 4, 16)
    full_ids = theirs["input_ids"][0].tolist()
    system = GME_SYSTEM.replace("You are a helpful assistant.", instruction or "You are a helpful assistant.")
    tokens = [int(grid.prod()) // 4 for grid in theirs.get("image_grid_thw", ())]
    images_text = "".join(VISION.replace("<|image_pad|>", "<|image_pad|>" * n) for n in tokens)
    head, tail = ids_of(family, system + images_text), ids_of(family, GME_TAIL)
    assert full_ids[: len(head)] == head
    assert full_ids[-len(tail) :] == tail
    text, room = full_ids[len(head) : -len(tail)], limit - len(head) - len(tail)
    assert 0 < room < len(text)
    parameters = {"instruction": instruction} if instruction else {}
    (row,) = family.rows(Item(LONG, files), truncate=side, **parameters)
    assert row.ids.tolist() == [*head, *(text[:room] if side == "end" else text[-room:]), *tail]
    assert row.dropped == len(full_ids) - limit
    assert len(row.images) == count


def test_images_that_exceed_the_limit_are_rejected(tiny: Tiny) -> None:
    family, file = family_with(tiny, GME, max_tokens=60), png(200, 180)
    (theirs,) = oracles.gme_inputs(family.directory, [{"text": "", "images": [open_image(file)]}], 4, 16)
    per_image = int(theirs["image_grid_thw"][0].prod()) // 4 + 2
    total_tokens = theirs["input_ids"].shape[1] + 2 * per_image
    assert len(family.rows(Item("", (file,)))[0].ids) == theirs["input_ids"].shape[1] <= 60 < total_tokens
    for item in (Item("", (file,) * 3), Item("the cat", (file,) * 3)):
        with pytest.raises(BadRequest) as error:
            family.rows(Item("good"), item)
        assert str(error.value) == (
            f"Input at index 1: images and instruction take {total_tokens} tokens, more than the model's "
            "context length (60 tokens)"
        )


def test_too_long_gme_text_is_rejected_with_truncate_none(tiny: Tiny) -> None:
    with pytest.raises(BadRequest, match=r"is longer than the model's context length \(50 tokens\).*index 0"):
        family_with(tiny, GME, max_tokens=50).rows(Item(LONG), truncate="none")


# Arbitrary inputs

SPECIAL_TOKENS = [
    "</s>",
    "<s>",
    "[CLS]",
    "[SEP]",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_end|>",
    "<cat-toy>",
]


def row_or_none(build: Callable[[], Row]) -> Row | None:
    """Return the row, or None if it was rejected with an error that names index 0 or the instruction."""
    try:
        return build()
    except BadRequest as error:
        message = str(error)
    assert "index 0" in message or message.startswith("instruction must not contain <|im_start|>")
    return None


ANY_TEXT = st.text(max_size=40) | st.lists(
    st.sampled_from(["the cat", " hello", "\n", "你好", "<|image_pad|>", "{text}", "🙂", *SPECIAL_TOKENS]), max_size=30
).map("".join)
PRESERVED = {
    # checkpoint: number of leading and trailing tokens that truncation preserves
    BGE: (1, 1),
    XLM: (1, 1),
    E5: (1, 1),
    GTE: (0, 1),
    QWEN3: (0, 1),
    CLIP_OLD: (1, 1),
    CLIP_NEW: (1, 1),
    GME: (3, 6),
}


@settings(deadline=None, max_examples=40)
@given(
    text=ANY_TEXT,
    instruction=st.none() | ANY_TEXT,
    limit=st.integers(3, 70),
    truncate=st.sampled_from(["end", "start", "none"]),
    images=st.lists(st.sampled_from([png(60, 40), png(9, 33), png(33, 9), b"", b"not an image"]), max_size=3),
)
@pytest.mark.parametrize("name", PRESERVED)
def test_any_text_with_any_limit_fits_or_is_rejected(
    name: str, text: str, instruction: str | None, limit: int, truncate: str, images: list[bytes], tiny: Tiny
) -> None:
    family = family_with(tiny, name, max_tokens=limit)
    parameters = {} if instruction is None or name in (CLIP_OLD, CLIP_NEW) else {"instruction": instruction}
    item = Item(text if text.strip() else "", tuple(image for image in images if image))
    row = row_or_none(lambda: family.rows(item, truncate=truncate, **parameters)[0])
    if row is None:
        return
    assert 0 < row.tokens <= max(limit, row.vision_tokens)
    assert len(row.ids) <= limit
    assert row.dropped >= 0
    if truncate == "none":
        assert row.dropped == 0
    if not len(row.ids):
        assert name in (CLIP_OLD, CLIP_NEW)
        return
    (full_ids,) = family.processor.tokenizer.encode([family.processor.template(parameters)(item)])
    head, tail = PRESERVED[name]
    assert row.ids[:head].tolist() == full_ids[:head].tolist()
    if name not in (CLIP_OLD, CLIP_NEW):  # CLIP rows end at the end-of-text token
        assert row.ids[len(row.ids) - tail :].tolist() == full_ids[len(full_ids) - tail :].tolist()
    image = getattr(family.model.network_config, "image_token", -1)
    assert (row.ids == image).sum() * 4 == row.vision_tokens


@settings(deadline=None, max_examples=40)
@given(
    ids=st.lists(st.integers(-2, 700), max_size=40),
    limit=st.integers(3, 30),
    truncate=st.sampled_from(["end", "start", "none"]),
)
@pytest.mark.parametrize("name", PRESERVED)
def test_any_ids_with_any_limit_fit_or_are_rejected(
    name: str, ids: list[int], limit: int, truncate: str, tiny: Tiny
) -> None:
    family = family_with(tiny, name, max_tokens=limit)
    row = row_or_none(lambda: ids_row(family, ids, truncate))
    if row is None:
        return
    row_ids = row.ids.tolist()
    assert 0 < len(row_ids) <= limit
    assert set(row_ids) <= set(ids)
    if family.model.pooling == "last":
        assert row_ids[-1] == ids[-1]
    if family.model.pooling == "cls":
        assert row_ids[0] == ids[0]
