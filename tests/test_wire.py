"""The contract between the engine and the gateway, compared with what both sides and the model repository use."""

import json
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_info import INFO
from tritonclient.grpc import model_config_pb2

from conftest import ROOT
from triton_embed.gateway.api.embeddings import REUSE_VALUES
from triton_embed.gateway.api.inputs import InputErrors, Prompt
from triton_embed.gateway.api.requests import EmbeddingRequest, parse_embeddings
from triton_embed.gateway.api.vector_formats import VectorFormat
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.settings import Settings
from triton_embed.python_backend import wire
from triton_embed.python_backend.checkpoint.repository import read_config
from triton_embed.python_backend.inputs.parameters import parse_parameters
from triton_embed.python_backend.wire import (
    CHOICES,
    InputError,
    InputErrorCode,
    Reused,
    dimensions_error,
    length_error,
    modality_error,
    vocabulary_error,
)

REPOSITORY = ROOT / "model_repository"
INPUTS = {wire.TEXT, wire.IMAGE, wire.INPUT_IDS}
OUTPUTS = {wire.EMBEDDING, wire.TOKENS, wire.DROPPED, wire.REUSED, wire.ERROR, wire.INFO, wire.IDS}


@pytest.mark.parametrize("family", sorted(path.name for path in REPOSITORY.iterdir()))
def test_families_declare_the_tensors_of_the_contract(family: str) -> None:
    config = read_config(REPOSITORY, family)
    inputs = {tensor.name for tensor in config.input}
    assert INPUTS - {wire.IMAGE} <= inputs <= INPUTS
    assert {tensor.name for tensor in config.output} == OUTPUTS
    types = {tensor.name: model_config_pb2.DataType.Name(tensor.data_type) for tensor in config.output}
    assert {name for name, datatype in types.items() if datatype == "TYPE_UINT8"} == {wire.ERROR, wire.INFO}
    assert "TYPE_STRING" not in types.values()  # asked for the classes of one, tritonserver divides by zero


def test_reused_codes_are_ordered_from_the_most_expensive_source() -> None:
    """Keep the numbers, which callers read, and the order, which a text of several chunks relies on."""
    assert [(code.name, code.value) for code in Reused] == [("COMPUTED", 0), ("IN_FLIGHT", 1), ("CACHED", 2)]
    assert list(REUSE_VALUES) == list(Reused)


@given(st.integers(0, 2**31), st.sampled_from(get_args(InputErrorCode)), st.text())
def test_input_error_survives_json(index: int, code: InputErrorCode, message: str) -> None:
    error = InputError(index, code, message)
    assert InputError.from_json(error.to_json()) == error
    assert InputError.from_json(error.write("json")) == error
    assert error.write("text") == error.text


@pytest.mark.parametrize(
    "text", ["", "Input at index 3 is bad", "7", "[]", "{}", '{"index": 3}', "{", '"text"', "null", "on_error must be"]
)
def test_other_text_is_no_input_error(text: str) -> None:
    assert InputError.from_json(text) is None


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("Input cannot be empty", "Input at index 3 cannot be empty"),
        ("Input: images take 9 tokens", "Input at index 3: images take 9 tokens"),
        ("The input (9 tokens) is longer.", "The input (9 tokens) is longer. (input at index 3)"),
        ("Model 'Input' takes no images", "Model 'Input' takes no images (input at index 3)"),
        ("instruction must not contain it", "instruction must not contain it (input at index 3)"),
        ("Inputs differ", "Inputs differ (input at index 3)"),
    ],
)
def test_text_names_the_index_once(message: str, text: str) -> None:
    assert InputError(3, "empty", message).text == text


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({}, set()),
        ({"vector_format": VectorFormat(sizes=(20, 40))}, {"dimensions"}),
        ({"prompt": Prompt("Find it.")}, {"instruction"}),
        ({"prompt": Prompt(prompt_name="query")}, {"prompt_name"}),
        ({"prompts": [Prompt("x"), Prompt(prompt_name="")]}, {"prompts"}),
        (
            {"errors": InputErrors(report=True), "truncate": "none", "long_text": "mean"},
            {"on_error", "truncate", "long_text"},
        ),
    ],
    ids=lambda value: " ".join(sorted(value)) or "none",  # sorted, because all test processes must agree on the names
)
def test_engine_accepts_the_parameters_that_the_gateway_sends(fields: dict[str, Any], sent: set[str]) -> None:
    request = EmbeddingRequest(model=None, texts=["a", "b"], ids=[], single=False, param="input", **fields)
    parameters = request.parameters(range(2))
    assert parameters.keys() == sent
    assert parse_parameters(json.dumps(parameters)) == parameters


@pytest.mark.parametrize("name", ["truncate", "long_text", "on_error"])
def test_gateway_accepts_the_choices_of_the_contract(name: str) -> None:
    default, *others = CHOICES[name]
    for choice in (default, *others):
        request = parse_embeddings(json.dumps({"input": "a", name: choice}).encode(), Settings())
        assert request.parameters(range(1)).get(name, default) == choice
    with pytest.raises(ApiError) as caught:
        parse_embeddings(json.dumps({"input": "a", name: "other"}).encode(), Settings())
    assert caught.value.param == name
    assert all(choice in caught.value.message for choice in CHOICES[name])


UNTRAINED = (
    "Model 'm' does not support matryoshka representation, changing output dimensions will lead to poor results."
)
LISTED = (
    "Model 'm' only supports [64, 128] matryoshka dimensions, using other output dimensions will lead to poor results."
)
TOO_MANY = "Provided dimensions are greater than max embedding dimension: 384"
TOO_FEW = "Requested dimensions must be greater than 0"


@pytest.mark.parametrize(
    ("trained", "dimensions", "message"),
    [
        (None, 384, None),
        (None, 383, UNTRAINED),
        (None, 1, UNTRAINED),
        (None, 385, TOO_MANY),
        (None, 0, TOO_FEW),
        (False, 383, UNTRAINED),
        ((), 383, UNTRAINED),
        ((64, 128), 64, None),
        ((64, 128), 128, None),
        ((64, 128), 384, None),
        ((64, 128), 65, LISTED),
        ((64, 128), 385, TOO_MANY),
        ((64, 128), -1, TOO_FEW),
        (True, 1, None),
        (True, 383, None),
        (True, 385, TOO_MANY),
        (True, 0, TOO_FEW),
        (True, -(2**63), TOO_FEW),
        (True, 2**63, TOO_MANY),
    ],
)
def test_dimensions_are_checked_against_the_model(
    trained: bool | tuple[int, ...] | None, dimensions: int, message: str | None
) -> None:
    assert dimensions_error(dimensions, replace(INFO, dimensions=384, matryoshka=trained)) == message


@settings(deadline=None)
@given(st.lists(st.integers(-3, 12), min_size=1), st.integers(1, 9))
def test_first_id_outside_the_vocabulary_is_named(ids: list[int], vocab_size: int) -> None:
    """Compare lists, which the gateway has, and arrays, which the engine has."""
    outside = [token_id for token_id in ids if token_id not in range(vocab_size)]
    expected = None
    if outside:
        expected = f"Input has token id {outside[0]}, which is outside the model's vocabulary (0 to {vocab_size - 1})"
    array = np.array(ids, np.int32)
    assert vocabulary_error(ids, min(ids), max(ids), vocab_size) == expected
    assert vocabulary_error(array, array.min(), array.max(), vocab_size) == expected


def test_length_is_limited_by_the_context_length() -> None:
    assert length_error(8, 8) is None
    expected = "The input (9 tokens) is longer than the model's context length (8 tokens)."
    assert length_error(9, 8) == expected


NO_IMAGES = "Model 'm' takes no images"
NOT_BOTH = "Model 'm' embeds a text or an image, not both together"
ONE_IMAGE = "Model 'm' embeds one image at a time"


@pytest.mark.parametrize(
    ("modalities", "errors"),
    [
        (("text",), (None, NO_IMAGES, NO_IMAGES, NO_IMAGES, NO_IMAGES)),
        (("text", "image"), (None, None, NOT_BOTH, ONE_IMAGE, NOT_BOTH)),
        (("text", "image", "text+image"), (None,) * 5),
    ],
)
def test_input_must_have_a_modality_of_the_model(modalities: tuple[str, ...], errors: tuple[str | None, ...]) -> None:
    inputs = [(True, 0), (False, 1), (True, 1), (False, 2), (True, 2)]
    assert [modality_error("m", modalities, *content) for content in inputs] == list(errors)
