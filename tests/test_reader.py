"""What a caller sent becomes rows: templates to the letter, special tokens, pictures and every rule about length.

Ids are transformers' own: AutoTokenizer's for texts, its image processor's counts for pictures. What the tokenizer
alone decides is in test_tokenizer.py.
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
from triton_embed.python_backend.request import Item
from triton_embed.python_backend.row import Row

Tiny = Callable[[str], Family]
TASK = "Given a web search query, retrieve relevant passages that answer the query"
BGE, XLM, E5, LLAMA = "bge-bert-cls", "bge-m3", "e5_mistral-mistral-window", "e5_mistral-llama-yarn"
GTE, QWEN3, GME = "gte_qwen2-bidirectional", "qwen3_embedding-bare", "gme_qwen2_vl-hub"
OLD, NEW = "clip-openai-extra-token", "clip-new-extra-token"  # the two ways to find the end of a text
SIDES = {"end": "right", "start": "left"}
GME_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
GME_TAIL = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


def limited(tiny: Tiny, name: str, **parameters: object) -> Family:
    """A tiny checkpoint with other words of the operator."""
    case = next(case for case in CASES if case.name == name)
    stated = {key: str(value) for key, value in parameters.items()}
    return Family(case.family, tiny(name).directory, **{**case.parameters, **stated})


def copied(tiny: Tiny, name: str, directory: Path, **files: Mapping[str, Any]) -> Path:
    """A copy of a tiny checkpoint, with keys set in some JSON files."""
    shutil.copytree(tiny(name).directory, directory)
    for stem, values in files.items():
        file = directory / f"{stem}.json"
        stated = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**stated, **values}))
    return directory


def prompted(tiny: Tiny, name: str, directory: Path, prompts: Mapping[str, str]) -> Family:
    """A tiny checkpoint that names these prompts and no others."""
    copied(tiny, name, directory, config_sentence_transformers={"prompts": prompts})
    return Family(next(case.family for case in CASES if case.name == name), directory)


def png(width: int, height: int, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def ids_of(family: Family, text: str) -> list[int]:
    """AutoTokenizer's, special tokens included."""
    found: list[int] = AutoTokenizer.from_pretrained(family.directory)(text)["input_ids"]
    return found


# Templates

FIND = {"instruction": "Find it."}
E5_PROMPTS = {"web_search_query": f"Instruct: {TASK}\nQuery: ", "sts_query": "Instruct: Find the same.\nQuery: "}
QWEN3_PROMPTS = {"query": f"Instruct: {TASK}\nQuery:", "document": ""}
# checkpoint, the prompts it names, what the request asks for, what "hello world" becomes
WRITTEN: list[tuple[str, dict[str, str], dict[str, str], str]] = [
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
    (OLD, {}, {}, "hello world"),
    # What looks like a place to fill in is the caller's own.
    (BGE, {}, {"instruction": "{text}{instruction}"}, "{text}{instruction}hello world"),
    (E5, {}, {"instruction": "{text}"}, "Instruct: {text}\nQuery: hello world"),
    (QWEN3, {}, {"instruction": "\\1 {} %s {0}"}, "Instruct: \\1 {} %s {0}\nQuery:hello world"),
    (E5, {}, {"instruction": ""}, "hello world"),
    (LLAMA, {}, {"prompt_name": ""}, "hello world"),
    (QWEN3, QWEN3_PROMPTS, {"prompt_name": ""}, "hello world"),
    (GME, {}, {"prompt_name": ""}, f"{GME_SYSTEM}hello world{GME_TAIL}"),
]


@pytest.mark.parametrize(("name", "prompts", "asked", "written"), WRITTEN)
def test_a_text_is_written_as_the_family_was_trained(
    name: str, prompts: dict[str, str], asked: dict[str, str], written: str, tiny: Tiny, tmp_path: Path
) -> None:
    reader = prompted(tiny, name, tmp_path / "named", prompts).reader
    assert reader.template(asked)(Item("hello world")) == written


@pytest.mark.parametrize("text", ["{text}", "{instruction} {images}", " leading", "trailing \n"])
def test_a_text_is_never_rewritten(text: str, tiny: Tiny) -> None:
    assert tiny(E5).reader.template({"instruction": "x"})(Item(text)) == f"Instruct: x\nQuery: {text}"
    assert tiny(GME).reader.template({})(Item(text)) == f"{GME_SYSTEM}{text}{GME_TAIL}"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_gmes_pictures_stand_before_the_text(count: int, tiny: Tiny) -> None:
    template = tiny(GME).reader.template({})
    assert template(Item("hello", (b"x",) * count)) == f"{GME_SYSTEM}{VISION * count}hello{GME_TAIL}"
    assert template(Item("", (b"x",) * count)) == f"{GME_SYSTEM}{VISION * count}{GME_TAIL}"


def test_the_prompts_of_the_checkpoint_are_those_sentence_transformers_reads(tiny: Tiny, tmp_path: Path) -> None:
    family = prompted(tiny, QWEN3, tmp_path / "named", {**QWEN3_PROMPTS, "odd": " {text} "})
    theirs = SentenceTransformer(str(family.directory), device="cpu").prompts
    assert family.reader.prompt_names == list(theirs)
    for name, prompt in theirs.items():
        assert family.reader.template({"prompt_name": name})(Item("hello")) == f"{prompt}hello"


PROMPTED: list[tuple[str, dict[str, str], str]] = [
    (XLM, {"query": "the cat sat: ", "odd": "a dog: "}, "odd"),
    (XLM, {"query": "the cat sat: "}, "query"),
    (XLM, {"query": "the cat sat: "}, "document"),
    (XLM, {}, "query"),
    (QWEN3, QWEN3_PROMPTS, "query"),
    (QWEN3, QWEN3_PROMPTS, "document"),
]


@pytest.mark.parametrize(("name", "prompts", "default"), PROMPTED)
def test_a_checkpoints_default_prompt_is_used_as_sentence_transformers_uses_it(
    name: str, prompts: dict[str, str], default: str, tiny: Tiny, tmp_path: Path
) -> None:
    stated = {"prompts": prompts, "default_prompt_name": default}
    directory = copied(tiny, name, tmp_path / "named", config_sentence_transformers=stated)
    family = Family(next(case.family for case in CASES if case.name == name), directory)
    theirs = SentenceTransformer(str(directory), device="cpu")
    asked: list[tuple[dict[str, str], dict[str, str]]] = [
        ({}, {}),
        ({"prompt_name": ""}, {"prompt": ""}),
        ({"instruction": ""}, {"prompt": ""}),
        *(({"prompt_name": other}, {"prompt_name": other}) for other in prompts),
    ]
    for ours, same in asked:
        row = family.rows(Item("hello world"), **ours)
        found = family.embedder.embed(row, [family.model.dimensions])
        wanted = theirs.encode(["hello world"], normalize_embeddings=True, **same)
        assert np.abs(found - wanted).max() <= 2e-5, ours
    apart = theirs.encode("hello world", prompt="") - theirs.encode("hello world")
    assert (np.abs(apart).max() > 1e-3) == bool(prompts.get(default))


def test_the_operators_query_instruction_serves_a_checkpoint_without_prompts(tiny: Tiny, tmp_path: Path) -> None:
    chinese = "为这个句子生成表示以用于检索相关文章："
    directory = prompted(tiny, BGE, tmp_path / "unnamed", {}).directory
    reader = Family("bge", directory, query_instruction=chinese).reader
    assert reader.prompt_names == ["query", "document"]
    assert reader.template({"prompt_name": "query"})(Item("北京")) == f"{chinese}北京"


@pytest.mark.parametrize(
    ("name", "prompts", "asked", "sentence"),
    [
        ("minilm", {}, {"instruction": "x"}, "Model 'minilm' takes no instruction: it was trained without one"),
        (OLD, {}, {"instruction": "x"}, "Model 'clip' takes no instruction: it was trained without one"),
        ("minilm", {}, {"prompt_name": "query"}, "Model 'minilm' has no prompt_name 'query'; it has: none"),
        (OLD, {}, {"prompt_name": "query"}, "Model 'clip' has no prompt_name 'query'; it has: none"),
        (GME, {}, {"prompt_name": "query"}, "Model 'gme_qwen2_vl' has no prompt_name 'query'; it has: none"),
        (BGE, {}, {"prompt_name": "Query"}, "Model 'bge' has no prompt_name 'Query'; it has: query, document"),
        (QWEN3, {}, {"prompt_name": "", "instruction": "x"}, "Send either instruction or prompt_name"),
        # A checkpoint that names its prompts has no others.
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
def test_a_prompt_that_a_model_does_not_have(
    name: str, prompts: dict[str, str], asked: dict[str, str], sentence: str, tiny: Tiny, tmp_path: Path
) -> None:
    family = Family("minilm", MINILM) if name == "minilm" else prompted(tiny, name, tmp_path / "named", prompts)
    with pytest.raises(BadRequest) as refused:
        family.reader.template(asked)
    assert str(refused.value) == sentence


# Special tokens

LONG = " ".join(["the cat sat on the mat, hello world"] * 30)
ENDS = {E5: "</s>", LLAMA: "</s>", GTE: "<|endoftext|>", QWEN3: "<|endoftext|>"}
STARTS = {E5: ["<s>"], LLAMA: ["<s>"], GTE: [], QWEN3: []}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ENDS)
def test_a_decoders_texts_end_with_one_eos_however_long_they_are(name: str, side: str, tiny: Tiny) -> None:
    family, limit = limited(tiny, name, max_tokens=17), 17
    tokenizer = AutoTokenizer.from_pretrained(family.directory)
    (eos,) = tokenizer.convert_tokens_to_ids([ENDS[name]])
    start = tokenizer.convert_tokens_to_ids(STARTS[name])
    body = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    room = limit - 1 - len(start)
    for text, kept in (("hello", None), (LONG, body[:room] if side == "end" else body[-room:])):
        (row,) = family.rows(Item(text), truncate=side)
        assert row.ids.tolist().count(eos) == 1
        assert row.ids[-1] == eos
        if kept is None:
            assert row.ids.tolist() == [*start, *tokenizer(text, add_special_tokens=False)["input_ids"], eos]
            assert row.dropped == 0
        else:
            assert row.ids.tolist() == [*start, *kept, eos]
            assert row.dropped == len(body) - room


def test_qwen3s_own_post_processor_appends_it(tiny: Tiny) -> None:
    """transformers' tokenizer does too, and so nothing may be appended to it."""
    (row,) = tiny(QWEN3).rows(Item("hello world"))
    plain = AutoTokenizer.from_pretrained(tiny(QWEN3).directory)("hello world", add_special_tokens=False)
    assert row.ids.tolist() == ids_of(tiny(QWEN3), "hello world")
    assert row.ids[:-1].tolist() == plain["input_ids"]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [BGE, XLM])
def test_cls_and_sep_survive(name: str, side: str, tiny: Tiny) -> None:
    family = limited(tiny, name, max_tokens=11)
    tokenizer = AutoTokenizer.from_pretrained(family.directory, truncation_side=SIDES[side])
    (row,) = family.rows(Item(LONG), truncate=side)
    assert row.ids.tolist() == tokenizer(LONG, truncation=True, max_length=11)["input_ids"]
    assert [row.ids[0], row.ids[-1]] == [tokenizer.cls_token_id, tokenizer.sep_token_id]


INSTRUCTED = {
    BGE: "Represent this sentence for searching: ",
    XLM: "find what the cat said",  # no space behind it: the last word may grow together with the text
    E5: "Instruct: Find it.\nQuery: ",
    LLAMA: "Instruct: Find it.\nQuery: ",
    GTE: "Instruct: Find it.\nQuery: ",
    QWEN3: "Instruct: Find it.\nQuery:",
}


@pytest.mark.parametrize(
    "text", [LONG, "\u4f60\u597d" * 60, LONG.replace(" ", " \n  ")], ids=["words", "Chinese", "spaces"]
)
@pytest.mark.parametrize("name", INSTRUCTED)
def test_a_text_that_loses_its_beginning_keeps_its_prompt(name: str, text: str, tiny: Tiny) -> None:
    """The tokens of the prompt stay: all that the tokenizer's own offsets place in it and nowhere else."""
    prompt, limit = INSTRUCTED[name], 40
    family = limited(tiny, name, max_tokens=limit)
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
def test_a_prompt_that_leaves_no_room_for_the_end_of_a_text(name: str, tiny: Tiny) -> None:
    family = limited(tiny, name, max_tokens=12)
    with pytest.raises(BadRequest, match=r"Input at index 0: images and instruction take .* tokens"):
        family.rows(Item(LONG), truncate="start", instruction="find the cat " * 4)


def rewrite_ending(directory: Path, template: str, *tokens: str) -> None:
    file = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    specials = [(token, tokenizer.token_to_id(token)) for token in tokens]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    tokenizer.save(file)


@pytest.mark.parametrize(
    ("name", "family", "ending", "wanted"),
    [
        (QWEN3, "qwen3_embedding", "<|im_end|>", "<|endoftext|>"),
        (GTE, "gte_qwen2", "<|im_end|>", "<|endoftext|>"),
        (E5, "e5_mistral", "<unk>", "</s>"),
    ],
)
def test_a_checkpoint_whose_texts_end_with_another_token(
    name: str, family: str, ending: str, wanted: str, tiny: Tiny, tmp_path: Path
) -> None:
    directory = copied(tiny, name, tmp_path / "other")
    rewrite_ending(directory, f"$A {ending}", ending)
    with pytest.raises(ConfigError) as refused:
        Family(family, directory)
    assert str(refused.value) == (
        f"{directory / 'tokenizer.json'} ends texts with '{ending}', the model was trained to see '{wanted}'"
    )


def test_an_eos_that_the_post_processor_puts_there_is_not_put_there_again(tiny: Tiny, tmp_path: Path) -> None:
    """As in files that were saved with add_eos_token."""
    directory = copied(tiny, E5, tmp_path / "e5")
    rewrite_ending(directory, "<s> $A </s>", "<s>", "</s>")
    (row,), (plain,) = (family.rows(Item("hello")) for family in (Family("e5_mistral", directory), tiny(E5)))
    assert row.ids.tolist() == plain.ids.tolist()


@pytest.mark.parametrize(
    ("name", "family", "config", "words"),
    [
        (E5, "e5_mistral", {"eos_token": "<end>"}, "has no token '<end>', which every text must end with"),
        (E5, "e5_mistral", {"eos_token": None}, "tokenizer_config.json: 'eos_token' is missing"),
    ],
)
def test_a_checkpoint_without_the_token_that_texts_end_with(
    name: str, family: str, config: dict[str, Any], words: str, tiny: Tiny, tmp_path: Path
) -> None:
    directory = copied(tiny, name, tmp_path / "other", tokenizer_config=config)
    with pytest.raises(ConfigError) as refused:
        Family(family, directory)
    assert words in str(refused.value)


def test_a_decoder_whose_tokenizer_lacks_endoftext(tiny: Tiny, tmp_path: Path) -> None:
    directory = copied(tiny, GTE, tmp_path / "gte")
    file = directory / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|another|>"))
    with pytest.raises(ConfigError, match=r"has no token '<\|endoftext\|>'"):
        Family("gte_qwen2", directory)


# Items that a model cannot take

EMPTY = "Input at index 0 cannot be empty or whitespace only"
NO_IMAGES = "takes no images (input at index 0)"


@pytest.mark.parametrize(
    ("name", "item", "sentence"),
    [
        *((name, Item(), EMPTY) for name in (BGE, E5, GTE, QWEN3, OLD, GME)),
        *((name, Item("", (b"x",)), NO_IMAGES) for name in (BGE, E5, GTE, QWEN3)),
        *((name, Item("a cat", (b"x",)), NO_IMAGES) for name in (BGE, QWEN3)),
        (
            OLD,
            Item("a cat", (b"x",)),
            "Model 'clip' embeds a text or an image, not both together (input at index 0)",
        ),
        (OLD, Item("", (b"x", b"y")), "Model 'clip' embeds one image at a time (input at index 0)"),
    ],
)
def test_an_item_that_a_model_cannot_take(name: str, item: Item, sentence: str, tiny: Tiny) -> None:
    with pytest.raises(BadRequest) as refused:
        tiny(name).rows(item)
    assert sentence in str(refused.value)


def test_the_index_is_that_of_the_item(tiny: Tiny) -> None:
    with pytest.raises(BadRequest, match=r"\(input at index 2\)"):
        tiny(OLD).rows(Item("a"), Item("", (png(9, 9),)), Item("b", (png(9, 9),)))
    with pytest.raises(BadRequest, match="Input at index 1 has an image that cannot be read"):
        tiny(GME).rows(Item("a"), Item("b", (png(9, 9), b"GIF89a")))


def test_what_a_model_reads(tiny: Tiny) -> None:
    stated = {name: tiny(name).reader.modalities for name in (BGE, E5, OLD, GME)}
    assert stated == {BGE: ("text",), E5: ("text",), OLD: ("text", "image"), GME: ("text", "image", "text+image")}


# CLIP


def clip_ids(family: Family) -> tuple[int, int, int]:
    """<|startoftext|>, <|endoftext|> and the token above it."""
    tokenizer = AutoTokenizer.from_pretrained(family.directory)
    start, end, extra = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>", "<cat-toy>"])
    assert start < end < extra
    return start, end, extra


def ids_row(family: Family, ids: Sequence[int], truncate: str = "end", index: int = 0) -> Row:
    return family.reader.ids_row(np.array(ids, dtype=np.int32), truncate, index)


@pytest.mark.parametrize("name", [OLD, NEW])
def test_the_end_of_a_text_is_where_transformers_finds_it(name: str, tiny: Tiny) -> None:
    family = tiny(name)
    start, end, extra = clip_ids(family)
    rows = [
        [start, 5, 6, end],
        [start, 5, end, end, end],  # padded as OpenAI's own tokenizer pads
        [start, 5, end, 7, 8, 0, 0],
        [end, 5, 6],
        [start, extra, 5, end],
        [start, 5, end, 9, extra, 4],
        [start, extra, extra, 5, end, extra],
        [extra, end],
    ]
    made = [ids_row(family, ids) for ids in rows]
    assert any(len(row.ids) < len(ids) for row, ids in zip(made, rows, strict=True))
    found = family.embedder.embed(made, [28] * len(rows))
    assert np.abs(found - oracles.clip_text_vectors(family.directory, rows)).max() <= 2e-5


TYPED_TEXTS = {
    "last": "a photo of a <cat-toy>",
    "first": "<cat-toy> on a hill",
    "typed": "a <|endoftext|> cat",
    "long": "a cat " * 60,
    "beyond the limit": "cat " * 99 + "<cat-toy>",
    "typed in a long one": "cat " * 40 + "<|endoftext|>" + " dog" * 60,
}


@pytest.mark.parametrize("name", [OLD, NEW])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", TYPED_TEXTS.values(), ids=list(TYPED_TEXTS))
def test_a_text_is_cut_and_pooled_as_transformers_does_it(text: str, side: str, name: str, tiny: Tiny) -> None:
    """It is cut first: a token beyond the limit ends nothing."""
    family = tiny(name)
    tokenizer = AutoTokenizer.from_pretrained(family.directory, truncation_side=SIDES[side])
    ids = tokenizer(text, truncation=True, max_length=77)["input_ids"]
    found = family.embedder.embed(family.rows(Item(text), truncate=side), [28])
    assert np.abs(found - oracles.clip_text_vectors(family.directory, [ids])).max() <= 2e-5


def test_ids_without_an_end_of_text(tiny: Tiny) -> None:
    """transformers would pool the first token of them, which sees nothing else."""
    start, end, _ = clip_ids(tiny(NEW))
    with pytest.raises(BadRequest) as refused:
        ids_row(tiny(NEW), [start, 5, 6], index=4)
    assert str(refused.value) == (f"Input at index 4 has no end-of-text token ({end}), whose place is what is pooled")
    ids = [start, 5, 6]
    found = tiny(OLD).embedder.embed([ids_row(tiny(OLD), ids)], [28])  # the highest id, wherever it is
    assert np.abs(found - oracles.clip_text_vectors(tiny(OLD).directory, [ids])).max() <= 2e-5


@pytest.mark.parametrize("name", [OLD, NEW])
@pytest.mark.parametrize("truncate", SIDES)
def test_ids_beyond_the_limit_keep_the_end_of_the_text(name: str, truncate: str, tiny: Tiny) -> None:
    start, end, _ = clip_ids(tiny(name))
    ids = [start, *range(5, 95), end, 3, 3]
    row = ids_row(tiny(name), ids, truncate)
    assert row.ids.tolist() == ([start, *range(5, 80), end] if truncate == "end" else [*range(19, 95), end])
    assert row.dropped == 15
    with pytest.raises(BadRequest, match=r"\(92 tokens\) is longer than .* \(77 tokens\)"):
        ids_row(tiny(name), ids, "none")


def test_ids_of_clip_outside_the_vocabulary(tiny: Tiny) -> None:
    _, end, extra = clip_ids(tiny(NEW))
    with pytest.raises(BadRequest, match=f"index 0 has token id {extra + 1}"):
        ids_row(tiny(NEW), [extra + 1, end])


def test_a_picture_is_a_row_without_ids(tiny: Tiny) -> None:
    family = tiny(OLD)
    text, picture = family.rows(Item("a cat"), Item("", (png(90, 60),)))
    tokens = oracles.clip_image_tokens(family.directory)
    assert (len(picture.ids), picture.tokens, picture.cost, picture.dropped) == (0, tokens, tokens, 0)
    assert picture.pictures[0].shape == (48, 48, 3)
    assert (text.tokens, text.cost, text.pictures) == (len(text.ids), len(text.ids), ())
    assert not family.reader.has_ids(Item("", (b"x",)))
    assert family.reader.has_ids(Item("a"))


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
@pytest.mark.parametrize("which", range(len(GME_ITEMS)))
def test_a_picture_is_as_many_tokens_as_transformers_makes_of_it(which: int, name: str, tiny: Tiny) -> None:
    family, item = tiny(name), GME_ITEMS[which]
    files = [png(*SIZES[i], seed=i) for i in item["images"]]
    limits = (family.serving.min_image_tokens, family.serving.max_image_tokens)
    asked = {**item, "images": [opened(file) for file in files]}
    (theirs,) = oracles.gme_inputs(family.directory, [asked], *limits)
    parameters = {"instruction": item["instruction"]} if "instruction" in item else {}
    (row,) = family.rows(Item(item["text"], tuple(files)), **parameters)
    patches = len(theirs["pixel_values"]) if files else 0
    assert row.ids.tolist() == theirs["input_ids"][0].tolist()
    assert (row.tokens, row.vision_tokens, row.cost) == (len(row.ids), patches, len(row.ids) + patches)
    assert row.dropped == 0
    sides = [(picture.shape[0] // 14, picture.shape[1] // 14) for picture in row.pictures]  # in the order sent
    assert sides == [tuple(grid[1:].tolist()) for grid in theirs.get("image_grid_thw", ())]


@pytest.mark.parametrize("files", [(), (png(60, 40),), (png(60, 40), png(40, 60))], ids=len)
@pytest.mark.parametrize("where", ["text", "instruction"])
def test_a_typed_image_token_is_refused(where: str, files: tuple[bytes, ...], tiny: Tiny) -> None:
    """It would take a picture's place, or be a picture without one."""
    text, parameters = ("<|image_pad|>", {}) if where == "text" else ("a", {"instruction": "x<|image_pad|>"})
    with pytest.raises(BadRequest) as refused:
        tiny(GME).rows(Item("good"), Item(text, files), **parameters)
    assert str(refused.value).endswith("has <|image_pad|> in its text, which stands for an image")


def test_ids_of_gme_with_the_image_token(tiny: Tiny) -> None:
    family = tiny(GME)
    (image,) = AutoTokenizer.from_pretrained(family.directory).convert_tokens_to_ids(["<|image_pad|>"])
    with pytest.raises(BadRequest) as refused:
        ids_row(family, [1, image, 2], index=3)
    assert str(refused.value) == (
        f"Input at index 3 has token id {image}, which stands for an image: send the image itself"
    )
    assert ids_row(family, [1, image - 1, 2]).ids.tolist() == [1, image - 1, 2]


def test_ids_of_gme_are_used_as_they_are_and_keep_the_last(tiny: Tiny) -> None:
    row = ids_row(limited(tiny, GME, max_tokens=6), list(range(10)))
    assert (row.ids.tolist(), row.dropped) == ([0, 1, 2, 3, 4, 9], 4)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("instruction", [None, "Find an image that shows what the text says."])
def test_truncation_keeps_head_pictures_and_tail(instruction: str | None, side: str, count: int, tiny: Tiny) -> None:
    limit = 84
    family, files = limited(tiny, GME, max_tokens=limit), tuple(png(60, 40, seed=i) for i in range(count))
    asked = {"text": LONG, "images": [opened(file) for file in files], "instruction": instruction}
    (theirs,) = oracles.gme_inputs(family.directory, [asked], 4, 16)
    whole = theirs["input_ids"][0].tolist()
    system = GME_SYSTEM.replace("You are a helpful assistant.", instruction or "You are a helpful assistant.")
    tokens = [int(grid.prod()) // 4 for grid in theirs.get("image_grid_thw", ())]
    shown = "".join(VISION.replace("<|image_pad|>", "<|image_pad|>" * n) for n in tokens)
    head, tail = ids_of(family, system + shown), ids_of(family, GME_TAIL)
    assert whole[: len(head)] == head
    assert whole[-len(tail) :] == tail
    text, room = whole[len(head) : -len(tail)], limit - len(head) - len(tail)
    assert 0 < room < len(text)
    parameters = {"instruction": instruction} if instruction else {}
    (row,) = family.rows(Item(LONG, files), truncate=side, **parameters)
    assert row.ids.tolist() == [*head, *(text[:room] if side == "end" else text[-room:]), *tail]
    assert row.dropped == len(whole) - limit
    assert len(row.pictures) == count


def test_pictures_alone_may_be_too_long(tiny: Tiny) -> None:
    family, file = limited(tiny, GME, max_tokens=60), png(200, 180)
    (theirs,) = oracles.gme_inputs(family.directory, [{"text": "", "images": [opened(file)]}], 4, 16)
    per_image = int(theirs["image_grid_thw"][0].prod()) // 4 + 2
    whole = theirs["input_ids"].shape[1] + 2 * per_image
    assert len(family.rows(Item("", (file,)))[0].ids) == theirs["input_ids"].shape[1] <= 60 < whole
    for item in (Item("", (file,) * 3), Item("the cat", (file,) * 3)):
        with pytest.raises(BadRequest) as refused:
            family.rows(Item("good"), item)
        assert str(refused.value) == (
            f"Input at index 1: images and instruction take {whole} tokens, more than the model's "
            "context length (60 tokens)"
        )


def test_gme_may_refuse_to_cut(tiny: Tiny) -> None:
    with pytest.raises(BadRequest, match=r"is longer than the model's context length \(50 tokens\).*index 0"):
        limited(tiny, GME, max_tokens=50).rows(Item(LONG), truncate="none")


# Anything at all

TYPED = ["</s>", "<s>", "[CLS]", "[SEP]", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_end|>", "<cat-toy>"]


def row_or_refusal(make: Callable[[], Row]) -> Row | None:
    """None: it was refused, by its index."""
    try:
        return make()
    except BadRequest as error:
        refusal = str(error)
    assert "index 0" in refusal or refusal.startswith("instruction has <|im_start|>")
    return None


ANYTHING = st.text(max_size=40) | st.lists(
    st.sampled_from(["the cat", " hello", "\n", "你好", "<|image_pad|>", "{text}", "🙂", *TYPED]), max_size=30
).map("".join)
ANY = {
    # checkpoint: tokens before and after a text that survive every cut
    BGE: (1, 1),
    XLM: (1, 1),
    E5: (1, 1),
    GTE: (0, 1),
    QWEN3: (0, 1),
    OLD: (1, 1),
    NEW: (1, 1),
    GME: (3, 6),
}


@settings(deadline=None, max_examples=40)
@given(
    text=ANYTHING,
    instruction=st.none() | ANYTHING,
    limit=st.integers(3, 70),
    truncate=st.sampled_from(["end", "start", "none"]),
    images=st.lists(st.sampled_from([png(60, 40), png(9, 33), png(33, 9), b"", b"no picture"]), max_size=3),
)
@pytest.mark.parametrize("name", ANY)
def test_any_text_under_any_limit_fits_or_is_refused(
    name: str, text: str, instruction: str | None, limit: int, truncate: str, images: list[bytes], tiny: Tiny
) -> None:
    family = limited(tiny, name, max_tokens=limit)
    parameters = {} if instruction is None or name in (OLD, NEW) else {"instruction": instruction}
    item = Item(text if text.strip() else "", tuple(image for image in images if image))
    row = row_or_refusal(lambda: family.rows(item, truncate=truncate, **parameters)[0])
    if row is None:
        return
    assert 0 < row.tokens <= max(limit, row.vision_tokens)
    assert len(row.ids) <= limit
    assert row.dropped >= 0
    if truncate == "none":
        assert row.dropped == 0
    if not len(row.ids):
        assert name in (OLD, NEW)
        return
    (whole,) = family.reader.tokenizer.encode([family.reader.template(parameters)(item)])
    before, after = ANY[name]
    assert row.ids[:before].tolist() == whole[:before].tolist()
    if name not in (OLD, NEW):  # whose rows end where they are pooled
        assert row.ids[len(row.ids) - after :].tolist() == whole[len(whole) - after :].tolist()
    image = getattr(family.model.shape, "image_token", -1)
    assert (row.ids == image).sum() * 4 == row.vision_tokens


@settings(deadline=None, max_examples=40)
@given(
    ids=st.lists(st.integers(-2, 700), max_size=40),
    limit=st.integers(3, 30),
    truncate=st.sampled_from(["end", "start", "none"]),
)
@pytest.mark.parametrize("name", ANY)
def test_any_ids_under_any_limit_fit_or_are_refused(
    name: str, ids: list[int], limit: int, truncate: str, tiny: Tiny
) -> None:
    family = limited(tiny, name, max_tokens=limit)
    row = row_or_refusal(lambda: ids_row(family, ids, truncate))
    if row is None:
        return
    kept = row.ids.tolist()
    assert 0 < len(kept) <= limit
    assert set(kept) <= set(ids)
    if family.model.pooling == "last":
        assert kept[-1] == ids[-1]
    if family.model.pooling == "cls":
        assert kept[0] == ids[0]
