"""Rotary positions: frequencies, attention factors and angles against transformers, for every supported scaling."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_config import config_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen2VLTextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

from triton_embed.python_backend.checkpoint.hf_config import RopeConfig
from triton_embed.python_backend.networks.rotary import Rotary, attention_factor, frequencies

HEAD_DIM, POSITIONS = 32, 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn without a trained length": {"rope_type": "yarn", "factor": 4.0},
    "yarn with a factor below 1": {**YARN, "factor": 0.5},
    "yarn with other turns": {**YARN, "beta_fast": 8.0, "beta_slow": 2},
    "yarn with equal turns": {**YARN, "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
    "yarn without options": {**YARN, "beta_fast": None, "beta_slow": None, "mscale": None, "attention_factor": None},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, truncated": {**YARN, "truncate": True},
    "yarn with an attention factor": {**YARN, "attention_factor": 1.375, "mscale": 2.0, "mscale_all_dim": 0.5},
    "yarn with both mscales": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5},
    "yarn with one mscale": {**YARN, "mscale": 1.5},
    "yarn for much longer texts": {**YARN, "factor": 40, "original_max_position_embeddings": 4096},
    "llama3": LLAMA3,
    "llama3 with a wide ramp": {**LLAMA3, "low_freq_factor": 0.25, "high_freq_factor": 16.0, "factor": 32},
}
THETAS = [1e4, 5e5, 1_000_000]


def configured(
    scaling: Mapping[str, Any], theta: float = 1e4, head_dim: int = HEAD_DIM, positions: int = POSITIONS
) -> LlamaConfig:
    """Return a config of transformers, which validates the keys."""
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rope_parameters={**scaling, "rope_theta": theta},
    )


def read(config: PreTrainedConfig) -> RopeConfig:
    """Read our config from the config.json that transformers writes."""
    return RopeConfig.read(config_file(config.to_dict()), HEAD_DIM if config.model_type != "llama" else config.head_dim)


def ours(
    scaling: Mapping[str, Any], theta: float = 1e4, head_dim: int = HEAD_DIM, positions: int = POSITIONS
) -> RopeConfig:
    return read(configured(scaling, theta, head_dim, positions))


def theirs(config: LlamaConfig, length: int | None = None) -> tuple[Tensor, float]:
    """Return the frequencies and the attention factor of transformers."""
    if config.rope_parameters["rope_type"] == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu", seq_len=length)


@pytest.mark.parametrize("head_dim", [HEAD_DIM, 20, 128])
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_equal_those_of_transformers(scaling: str, theta: float, head_dim: int) -> None:
    config = configured(SCALINGS[scaling], theta, head_dim)
    rope, (expected, factor) = read(config), theirs(config)
    computed = frequencies(rope)
    assert (computed.dtype, computed.shape) == (torch.float32, (head_dim // 2,))
    torch.testing.assert_close(computed, expected, rtol=2e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)


def test_every_scaling_is_tested() -> None:
    """Check that only longrope and proportional are untested, which the checkpoints of no family use."""
    tested = {scaling["rope_type"] for scaling in SCALINGS.values()}
    assert tested == {"default", *ROPE_INIT_FUNCTIONS} - {"longrope", "proportional"}


@pytest.mark.parametrize("length", [0, 1, POSITIONS - 1, POSITIONS, POSITIONS + 1, 3 * POSITIONS, 4 * POSITIONS])
@pytest.mark.parametrize("factor", [1.0, 2.0, 4.5])
def test_dynamic_frequencies_depend_on_the_length(factor: float, length: int) -> None:
    scaling = {"rope_type": "dynamic", "factor": factor}
    expected, _ = theirs(configured(scaling), length or None)
    torch.testing.assert_close(frequencies(ours(scaling), length), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("scaling", [key for key in SCALINGS if key != "dynamic"])
def test_other_frequencies_do_not_depend_on_the_length(scaling: str) -> None:
    rope, config = ours(SCALINGS[scaling]), configured(SCALINGS[scaling])
    torch.testing.assert_close(frequencies(rope, 10 * POSITIONS), theirs(config)[0], rtol=2e-6, atol=0)


@settings(deadline=None, max_examples=80)
@given(
    theta=st.floats(100, 1e7),
    factor=st.floats(1, 64),
    trained=st.integers(16, 200_000),
    half=st.integers(2, 80),
    fast=st.floats(2, 64),
    slow=st.floats(0.25, 2),
    truncate=st.booleans(),
)
def test_random_yarn_parameters_agree(
    theta: float, factor: float, trained: int, half: int, fast: float, slow: float, truncate: bool
) -> None:
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": trained,
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": truncate,
    }
    expected, factor = theirs(configured(scaling, theta, 2 * half))
    rope = ours(scaling, theta, 2 * half)
    torch.testing.assert_close(frequencies(rope), expected, rtol=1e-5, atol=0)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)


def packed_positions(lengths: Sequence[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def assert_angles(angles: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Compare (cosines, sines) [..., head_dim/2] with those of transformers [..., head_dim], whose halves are equal."""
    for ours, theirs in zip(angles, expected, strict=True):
        half = theirs.shape[-1] // 2
        assert torch.equal(theirs[..., :half], theirs[..., half:])
        assert (ours.dtype, ours.shape) == (torch.float32, theirs[..., :half].shape)
        torch.testing.assert_close(ours, theirs[..., :half], rtol=0, atol=2e-5)


@pytest.mark.parametrize("lengths", [(1,), (5, 1, 33), (POSITIONS, 64, 2)], ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_angles_of_packed_sequences(scaling: str, lengths: tuple[int, ...]) -> None:
    positions = packed_positions(lengths)
    expected = LlamaRotaryEmbedding(configured(SCALINGS[scaling]))(torch.zeros(1), positions[None])
    angles = Rotary(ours(SCALINGS[scaling]), "cpu")(positions[None], lengths)
    assert_angles(angles, tuple(x[0] for x in expected))


@pytest.mark.parametrize("lengths", [(3, 200, 5, 64, 65, 1), (65,), (256, 256, 7), (64, 63)], ids=str)
def test_dynamic_angles_do_not_depend_on_the_batch(lengths: tuple[int, ...]) -> None:
    """Compare each sequence of a batch with the same sequence alone: its length alone determines its angles."""
    scaling = SCALINGS["dynamic"]
    angles = Rotary(ours(scaling), "cpu")(packed_positions(lengths)[None], lengths)
    start = 0
    for length in lengths:
        alone = LlamaRotaryEmbedding(configured(scaling))(torch.zeros(1), torch.arange(length)[None])
        assert_angles(tuple(x[start : start + length] for x in angles), tuple(x[0] for x in alone))
        start += length


def test_rotary_keeps_no_state_between_calls() -> None:
    """Compute a short sequence after a long one. transformers keeps the length of the longest until a short one."""
    rotary, short, long = Rotary(ours(SCALINGS["dynamic"]), "cpu"), torch.arange(9)[None], torch.arange(250)[None]
    rotary(long, [250])
    fresh = LlamaRotaryEmbedding(configured(SCALINGS["dynamic"]))(torch.zeros(1), short)
    assert_angles(rotary(short, [9]), tuple(x[0] for x in fresh))


@pytest.mark.parametrize("scaling", ["default", "linear", "yarn", "dynamic"])
@pytest.mark.parametrize("sections", [(4, 6, 6), (1, 2, 13), (14, 1, 1)], ids=str)
def test_angles_on_three_axes(sections: tuple[int, int, int], scaling: str) -> None:
    config = Qwen2VLTextConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        rope_parameters={**SCALINGS[scaling], "rope_theta": 1e4, "mrope_section": list(sections)},
    )
    positions = torch.randint(0, POSITIONS, (3, 41), generator=torch.Generator().manual_seed(7))
    expected = Qwen2VLRotaryEmbedding(config)(torch.zeros(1), positions[:, None])
    assert_angles(Rotary(read(config), "cpu")(positions, [20, 21]), tuple(x[0] for x in expected))


def test_constants_are_real_when_parameters_are_built_on_meta() -> None:
    with torch.device("meta"):
        rotary = Rotary(ours(SCALINGS["dynamic"]), "cpu")
    cos, _ = rotary(torch.arange(100)[None], [100])
    expected = LlamaRotaryEmbedding(configured(SCALINGS["dynamic"]))(torch.zeros(1), torch.arange(100)[None])
    assert_angles((cos, cos), (expected[0][0], expected[0][0]))
