"""Tests of the token budget by device, network and operator's limit."""

import pytest

from triton_embed.python_backend.execution.budget import Budget

MINILM, BGE_BASE = 10_616_832, 84_934_656  # weights of linear layers


@pytest.mark.parametrize(
    ("device", "weights", "limit", "pass_tokens", "shared_pass_tokens", "small_job_tokens"),
    [
        ("cpu", MINILM, 0, 4_096, 512, 256),
        ("cpu", BGE_BASE, 0, 1_024, 512, 256),
        ("cpu", BGE_BASE, 8_192, 8_192, 512, 256),
        ("cpu", MINILM, 256, 256, 128, 64),
        ("cuda:3", MINILM, 1_024, 1_024, 512, 256),
    ],
)
def test_budget_fits_the_device_and_the_network(
    device: str, weights: int, limit: int, pass_tokens: int, shared_pass_tokens: int, small_job_tokens: int
) -> None:
    assert Budget.of(device, weights, limit) == Budget(pass_tokens, shared_pass_tokens, small_job_tokens)


@pytest.mark.parametrize(
    ("weights", "flops", "milliseconds"),
    [
        (MINILM, 790e12, (0, 1)),  # the most tokens take less than a pass may
        (BGE_BASE, 790e12, (5, 6)),
        (440_401_920, 790e12, (24, 26)),  # Qwen3-0.6B
        (1_310_195_712, 790e12, (24, 26)),  # gte-Qwen2-1.5B
        (6_979_321_856, 790e12, (30, 32)),  # e5-mistral-7b: the least tokens take longer
        (440_401_920, 120e12, (24, 26)),  # a smaller GPU
    ],
)
def test_pass_on_a_gpu_takes_as_long_as_a_query_may_wait(
    weights: int, flops: float, milliseconds: tuple[float, float]
) -> None:
    budget = Budget.of("cuda:0", weights, 0, flops)
    assert 1_024 <= budget.pass_tokens <= 16_384
    low, high = milliseconds
    assert low <= 1_000 * budget.pass_tokens * 2 * weights / (0.6 * flops) <= high
