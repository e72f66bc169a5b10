"""Checks of a request against a model, before anything is sent to Triton."""

import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from pydantic import ValidationError

from triton_embed.gateway.api.inputs import InputErrors, Prompt
from triton_embed.gateway.api.requests import EmbeddingRequest
from triton_embed.gateway.api.vector_formats import VectorFormat
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.triton.model_info import fit, read_info
from triton_embed.python_backend.wire import ModelInfo

INFO = ModelInfo(
    name="m",
    family="bert",
    checkpoint="org/m",
    dimensions=60,
    max_model_len=8,
    vocab_size=100,
    pooling="cls",
    modalities=("text",),
    matryoshka=(20, 40),
    instructions=True,
    prompt_names=("query",),
    default_prompt_name=None,
    batch_tokens=1024,
    small_tokens=256,
    max_request_tokens=300_000,
    dtype="float32",
    device="cpu",
    kernels="torch",
    instances=1,
)
POSITIVE = ("dimensions", "max_model_len", "vocab_size", "batch_tokens", "max_request_tokens")


def test_info_of_the_engine_is_read() -> None:
    for info in (INFO, replace(INFO, matryoshka=True, checkpoint=None), replace(INFO, matryoshka=None, small_tokens=0)):
        assert read_info(info.to_json().encode()) == info
    assert read_info(json.dumps({**asdict(INFO), "added_later": 1}).encode()) == INFO


@pytest.mark.parametrize(
    "changes",
    [
        *({field: value} for field in POSITIVE for value in (0, -1)),
        {"dimensions": "many"},
        {"modalities": None},
        {"matryoshka": "some"},
        {"prompt_names": "query"},
        {"kernels": None},
    ],
    ids=str,
)
def test_impossible_info_is_rejected(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        read_info(json.dumps({**asdict(INFO), **changes}).encode())


@pytest.mark.parametrize("field", [field.name for field in fields(ModelInfo)])
def test_incomplete_info_is_rejected(field: str) -> None:
    with pytest.raises(ValidationError):
        read_info(json.dumps({key: value for key, value in asdict(INFO).items() if key != field}).encode())


def sizes(*dimensions: int | None) -> VectorFormat:
    return VectorFormat(sizes=tuple(size for size in dimensions if size is not None))


TEXT = EmbeddingRequest(model="m", texts=["a"], ids=[], single=True, param="input")
IDS = replace(TEXT, texts=[], ids=[[1, 99], [0]])

NO_MATRYOSHKA = (
    "Model 'm' does not support matryoshka representation, changing output dimensions will lead to poor results."
)
NOT_LISTED = (
    "Model 'm' only supports [20, 40] matryoshka dimensions, using other output dimensions will lead to poor results."
)


@pytest.mark.parametrize(
    ("matryoshka", "dimensions"),
    [(None, 60), (None, None), (False, 60), ((20, 40), 60), ((20, 40), 20), ((20, 40), 40), (True, 1), (True, 60)],
)
def test_valid_dimensions(matryoshka: Any, dimensions: int | None) -> None:
    fit(replace(TEXT, vector_format=sizes(dimensions)), replace(INFO, matryoshka=matryoshka))


@pytest.mark.parametrize(
    ("matryoshka", "dimensions", "message"),
    [
        (None, 30, NO_MATRYOSHKA),
        (False, 30, NO_MATRYOSHKA),
        ((20, 40), 30, NOT_LISTED),
        (True, 61, "Provided dimensions are greater than max embedding dimension: 60"),
        (None, 2**63, "Provided dimensions are greater than max embedding dimension: 60"),
        (True, 0, "Requested dimensions must be greater than 0"),
        ((20, 40), -20, "Requested dimensions must be greater than 0"),
    ],
)
def test_invalid_dimensions(matryoshka: Any, dimensions: int, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        fit(replace(TEXT, vector_format=sizes(dimensions)), replace(INFO, matryoshka=matryoshka))
    assert (caught.value.status, caught.value.message, caught.value.param) == (400, message, "dimensions")


def test_valid_ids() -> None:
    fit(IDS, INFO)
    fit(replace(IDS, ids=[[1] * 8], truncate="none"), INFO)
    fit(replace(IDS, ids=[[1] * 9], truncate="end"), INFO)


@pytest.mark.parametrize("foreign", [-1, 100, 2**40])
def test_id_outside_the_vocabulary_is_rejected_with_its_index(foreign: int) -> None:
    with pytest.raises(ApiError) as caught:
        fit(replace(IDS, ids=[[1], [2, foreign]]), INFO)
    assert (caught.value.status, caught.value.param) == (400, "input")
    assert f"Input at index 1 has token id {foreign}, " in caught.value.message
    assert "(0 to 99)" in caught.value.message
    assert "check_embedding_ctx_length=False" in caught.value.message


def test_long_ids_are_rejected_without_truncation() -> None:
    with pytest.raises(ApiError, match=r"The input \(9 tokens\) is longer than .* \(8 tokens\)\. \(input at index 1\)"):
        fit(replace(IDS, ids=[[1], [1] * 9], truncate="none"), INFO)


@pytest.mark.parametrize(
    ("request_", "instructions", "message", "param"),
    [
        (replace(TEXT, prompt=Prompt("x")), False, "Model 'm' takes no instruction", "instruction"),
        (replace(IDS, prompt=Prompt("x")), True, "instruction needs text", "instruction"),
        (replace(IDS, prompt=Prompt(None, "query")), True, "prompt_name needs text", "prompt_name"),
        (replace(IDS, prompt=Prompt(None, None, "query")), True, "prompt_name needs text", "prompt_name"),
        (replace(TEXT, prompt=Prompt(None, "q")), True, "has no prompt_name 'q'; it has: query", "prompt_name"),
        (
            replace(TEXT, texts=["a", "b"], prompts=[Prompt(), Prompt("x")]),
            False,
            "Input at index 1: Model 'm' takes no instruction",
            "instruction",
        ),
    ],
)
def test_invalid_instructions_and_prompt_names(
    request_: EmbeddingRequest, instructions: bool, message: str, param: str
) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        fit(request_, replace(INFO, instructions=instructions))
    assert (caught.value.status, caught.value.param) == (400, param)


ITEMS = replace(TEXT, texts=["a", "", "b"], images=[(), ("x",), ()])
BOTH = replace(TEXT, texts=["a", "b"], images=[(), ("x",)])
SEVERAL = replace(TEXT, texts=["a", ""], images=[(), ("x", "y")])
CLIP = ("text", "image")
GME = ("text", "image", "text+image")


@pytest.mark.parametrize(
    ("request_", "modalities"), [(ITEMS, CLIP), (ITEMS, GME), (BOTH, GME), (SEVERAL, GME), (TEXT, CLIP), (IDS, GME)]
)
def test_valid_images(request_: EmbeddingRequest, modalities: tuple[str, ...]) -> None:
    fit(request_, replace(INFO, modalities=modalities))


@pytest.mark.parametrize(
    ("request_", "modalities", "message"),
    [
        (ITEMS, ("text",), "Model 'm' takes no images (input at index 1)"),
        (BOTH, ("text",), "Model 'm' takes no images (input at index 1)"),
        (BOTH, CLIP, "Model 'm' embeds a text or an image, not both together (input at index 1)"),
        (SEVERAL, CLIP, "Model 'm' embeds one image at a time (input at index 1)"),
    ],
)
def test_images_the_model_cannot_embed(request_: EmbeddingRequest, modalities: tuple[str, ...], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        fit(replace(request_, param="image_data"), replace(INFO, modalities=modalities))
    assert (caught.value.status, caught.value.message, caught.value.param) == (400, message, "image_data")


def test_instruction_or_prompt_name_alone_is_valid() -> None:
    assert fit(replace(TEXT, prompt=Prompt("x")), INFO).prompt == Prompt("x")
    assert fit(replace(TEXT, prompt=Prompt(None, "query")), INFO).prompt == Prompt(None, "query")
    assert fit(replace(IDS, prompt=Prompt(None, None, "document")), INFO).prompt == Prompt()


@pytest.mark.parametrize(
    ("side", "names", "default", "instructions", "prompt"),
    [
        ("query", ("query",), None, True, Prompt(None, "query")),
        ("document", ("query",), None, True, Prompt()),
        ("document", ("query", "document"), "query", True, Prompt(None, "document")),
        ("document", ("query", "passage"), None, False, Prompt(None, "passage")),
        ("document", ("query",), "query", True, Prompt(None, "")),  # the default prompt does not apply to documents
        ("query", (), None, False, Prompt()),  # trained without prompts
    ],
)
def test_input_type_becomes_the_prompt_of_the_model(
    side: str, names: tuple[str, ...], default: str | None, instructions: bool, prompt: Prompt
) -> None:
    model = replace(INFO, prompt_names=names, default_prompt_name=default, instructions=instructions)
    assert fit(replace(TEXT, prompt=Prompt(None, None, side)), model).prompt == prompt
    per_input = fit(
        replace(TEXT, texts=["a", "b"], prompts=[Prompt(None, None, side), Prompt("x")][: 1 + instructions]), model
    )
    assert per_input.prompts[0] == prompt


def test_empty_prompt_name_disables_the_default_prompt() -> None:
    no_prompt = replace(TEXT, prompt=Prompt(None, ""))
    assert fit(no_prompt, INFO).prompt == Prompt()
    assert fit(no_prompt, replace(INFO, default_prompt_name="query")).prompt == Prompt(None, "")


def test_query_without_a_query_prompt_is_rejected() -> None:
    model = replace(INFO, prompt_names=())
    with pytest.raises(ApiError, match="has no query prompt: send an instruction") as caught:
        fit(replace(TEXT, prompt=Prompt(None, None, "query")), model)
    assert caught.value.param == "input_type"


def test_reported_errors_clear_their_inputs() -> None:
    ids = replace(IDS, ids=[[1], [100], [1] * 9], truncate="none", errors=InputErrors(report=True))
    assert fit(ids, INFO).ids == [[1], [], []]
    assert sorted(ids.errors.by_index) == [1, 2]
    items = replace(BOTH, texts=["a", "b"], images=[(), ("x",)], errors=InputErrors(report=True))
    fit(items, INFO)
    assert (items.texts, items.images, list(items.errors.by_index)) == (["a", ""], [(), ()], [1])


def test_long_ids_are_valid_with_long_text_mean() -> None:
    fit(replace(IDS, ids=[[1] * 9], truncate="none", long_text="mean"), INFO)
