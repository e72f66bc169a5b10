"""Tests of the token budget by device, network and operator's limit."""

import pytest

from triton_embed.python_backend.execution.budget import Budget

MINILM, BGE_BASE = 10_616_832, 84_934_656  # weights of linear layers


@pytest.mark.parametrize(
    ("device", "weights", "limit", "pass_tokens", "shared_pass_tokens", "small_job_tokens"),
    [
        ("cpu", MINILM, 0, 4_096, 512, 256),
        ("cpu", BGE_BASE, 0, 1_024, 512, 256),
        ("cuda:0", MINILM, 0, 16_384, 8_192, 4_096),
        ("cuda:0", BGE_BASE, 0, 16_384, 8_192, 4_096),
        ("cpu", BGE_BASE, 8_192, 8_192, 512, 256),
        ("cpu", MINILM, 256, 256, 128, 64),
        ("cuda:3", MINILM, 1_024, 1_024, 512, 256),
    ],
)
def test_budget_fits_the_device_and_the_network(
    device: str, weights: int, limit: int, pass_tokens: int, shared_pass_tokens: int, small_job_tokens: int
) -> None:
    assert Budget.of(device, weights, limit) == Budget(pass_tokens, shared_pass_tokens, small_job_tokens)
