"""Whether a request fits a model is known before Triton is asked."""

from dataclasses import replace
from typing import Any

import pytest

from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.model import ModelInfo, check
from triton_embed.gateway.schemas import EmbeddingRequest

INFO = ModelInfo(
    name="m",
    family="bert",
    checkpoint="org/m",
    dimensions=60,
    max_model_len=8,
    vocab_size=100,
    pooling="cls",
    modalities=["text"],
    matryoshka=[20, 40],
    instructions=True,
    prompt_names=["query"],
    dtype="float32",
    device="cpu",
    kernels="torch",
)
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
    [(None, 60), (None, None), (False, 60), ([20, 40], 60), ([20, 40], 20), ([20, 40], 40), (True, 1), (True, 60)],
)
def test_dimensions_that_fit(matryoshka: Any, dimensions: int | None) -> None:
    check(replace(TEXT, dimensions=dimensions), INFO.model_copy(update={"matryoshka": matryoshka}))


@pytest.mark.parametrize(
    ("matryoshka", "dimensions", "message"),
    [
        (None, 30, NO_MATRYOSHKA),
        (False, 30, NO_MATRYOSHKA),
        ([20, 40], 30, NOT_LISTED),
        (True, 61, "Provided dimensions are greater than max embedding dimension: 60"),
        (None, 2**63, "Provided dimensions are greater than max embedding dimension: 60"),
        (True, 0, "Requested dimensions must be greater than 0"),
        ([20, 40], -20, "Requested dimensions must be greater than 0"),
    ],
)
def test_dimensions_that_do_not(matryoshka: Any, dimensions: int, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        check(replace(TEXT, dimensions=dimensions), INFO.model_copy(update={"matryoshka": matryoshka}))
    assert (caught.value.status, caught.value.message, caught.value.param) == (400, message, "dimensions")


def test_ids_within_the_vocabulary_and_of_the_right_length_fit() -> None:
    check(IDS, INFO)
    check(replace(IDS, ids=[[1] * 8], truncate="none"), INFO)
    check(replace(IDS, ids=[[1] * 9], truncate="end"), INFO)


@pytest.mark.parametrize("foreign", [-1, 100, 2**40])
def test_a_foreign_id_is_named_with_its_index(foreign: int) -> None:
    with pytest.raises(ApiError) as caught:
        check(replace(IDS, ids=[[1], [2, foreign]]), INFO)
    assert (caught.value.status, caught.value.param) == (400, "input")
    assert f"Input at index 1 has token id {foreign}, " in caught.value.message
    assert "(0 to 99)" in caught.value.message
    assert "check_embedding_ctx_length=False" in caught.value.message


def test_ids_too_long_when_nothing_may_be_cut() -> None:
    with pytest.raises(ApiError, match=r"The input \(9 tokens\) is longer than .* \(8 tokens\)\. \(input at index 1\)"):
        check(replace(IDS, ids=[[1], [1] * 9], truncate="none"), INFO)


@pytest.mark.parametrize(
    ("request_", "instructions", "message", "param"),
    [
        (replace(TEXT, instruction="x"), False, "Model 'm' takes no instruction", "instruction"),
        (replace(TEXT, instruction="x", prompt_name="query"), True, "either instruction or prompt_name", "prompt_name"),
        (replace(IDS, instruction="x"), True, "instruction needs text", "instruction"),
        (replace(IDS, prompt_name="query"), True, "prompt_name needs text", "prompt_name"),
    ],
)
def test_instructions_that_do_not_fit(request_: EmbeddingRequest, instructions: bool, message: str, param: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        check(request_, INFO.model_copy(update={"instructions": instructions}))
    assert (caught.value.status, caught.value.param) == (400, param)


ITEMS = replace(TEXT, texts=["a", "", "b"], images=[(), ("x",), ()])
BOTH = replace(TEXT, texts=["a", "b"], images=[(), ("x",)])
SEVERAL = replace(TEXT, texts=["a", ""], images=[(), ("x", "y")])
CLIP = ["text", "image"]
GME = ["text", "image", "text+image"]


@pytest.mark.parametrize(
    ("request_", "modalities"), [(ITEMS, CLIP), (ITEMS, GME), (BOTH, GME), (SEVERAL, GME), (TEXT, CLIP), (IDS, GME)]
)
def test_images_that_fit(request_: EmbeddingRequest, modalities: list[str]) -> None:
    check(request_, INFO.model_copy(update={"modalities": modalities}))


@pytest.mark.parametrize(
    ("request_", "modalities", "message"),
    [
        (ITEMS, ["text"], "Model 'm' takes no images: input at index 1 has one"),
        (BOTH, ["text"], "Model 'm' takes no images: input at index 1 has one"),
        (BOTH, CLIP, "Model 'm' embeds a text or an image, not both together: input at index 1 has both"),
        (SEVERAL, CLIP, "Model 'm' embeds one image at a time: input at index 1 has 2"),
    ],
)
def test_images_that_do_not_fit(request_: EmbeddingRequest, modalities: list[str], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        check(replace(request_, param="image_data"), INFO.model_copy(update={"modalities": modalities}))
    assert (caught.value.status, caught.value.message, caught.value.param) == (400, message, "image_data")


def test_an_instruction_or_a_prompt_name_alone_fits() -> None:
    check(replace(TEXT, instruction="x"), INFO)
    check(replace(TEXT, prompt_name="query"), INFO)
