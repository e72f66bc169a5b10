"""The contract between the engine and the gateway, compared with what both sides and the model repository use."""

import json
from typing import Any

import pytest

from conftest import ROOT
from triton_embed.gateway.api.inputs import InputErrors, Prompt
from triton_embed.gateway.api.requests import REUSED, EmbeddingRequest
from triton_embed.gateway.api.vector_formats import VectorFormat
from triton_embed.python_backend import wire
from triton_embed.python_backend.checkpoint.repository import read_config
from triton_embed.python_backend.inputs.parameters import parse_parameters
from triton_embed.python_backend.wire import Reused

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
