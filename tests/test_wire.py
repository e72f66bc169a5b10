"""The contract between the engine and the gateway, compared with what both sides and the model repository use."""

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from triton_embed.gateway.api.inputs import InputErrors, Prompt
from triton_embed.gateway.api.requests import REUSED, EmbeddingRequest
from triton_embed.gateway.api.vector_formats import VectorFormat
from triton_embed.python_backend import wire
from triton_embed.python_backend.checkpoint.repository import read_config
from triton_embed.python_backend.inputs.parameters import parse_parameters
from triton_embed.python_backend.wire import InputError, InputErrorCode, Reused

REPOSITORY = ROOT / "model_repository"
INPUTS = {wire.TEXT, wire.IMAGE, wire.INPUT_IDS}
OUTPUTS = {wire.EMBEDDING, wire.TOKENS, wire.DROPPED, wire.REUSED, wire.ERROR, wire.INFO, wire.IDS}


@pytest.mark.parametrize("family", sorted(path.name for path in REPOSITORY.iterdir()))
def test_families_declare_the_tensors_of_the_contract(family: str) -> None:
    config = read_config(REPOSITORY, family)
    inputs = {tensor.name for tensor in config.input}
    assert INPUTS - {wire.IMAGE} <= inputs <= INPUTS
    assert {tensor.name for tensor in config.output} == OUTPUTS


def test_reused_codes_are_ordered_from_the_most_expensive_source() -> None:
    """Keep the numbers, which callers read, and the order, which a text of several chunks relies on."""
    assert [(code.name, code.value) for code in Reused] == [("COMPUTED", 0), ("IN_FLIGHT", 1), ("CACHED", 2)]
    assert list(REUSED) == list(Reused)


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
    ids=str,
)
def test_engine_accepts_the_parameters_that_the_gateway_sends(fields: dict[str, Any], sent: set[str]) -> None:
    request = EmbeddingRequest(model=None, texts=["a", "b"], ids=[], single=False, param="input", **fields)
    parameters = request.parameters(range(2))
    assert parameters.keys() == sent
    assert parse_parameters(json.dumps(parameters)) == parameters
