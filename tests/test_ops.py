"""Every op behind kernels/ops.py against torch in float64, transformers and sentence-transformers.

Errors are relative Frobenius norms against float64 on the same rounded inputs, and no row is worse than four times
the bound. Shapes are awkward on purpose: length 1, primes, one long sequence among many short ones.
"""

import ctypes.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import normalize_embeddings, truncate_embeddings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, CLIPVisionConfig, Qwen2VLTextConfig, Qwen3Config
from transformers.activations import ACT2FN
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from triton_embed.kernels import backend
from triton_embed.kernels import ops as kernels
from triton_embed.kernels.cpu import linear_onednn as onednn
from triton_embed.kernels.ops import POOLING_MODES, Ops
from triton_embed.kernels.packed import Packed

ops = Ops.on("cpu", torch.float32)

BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
DTYPES = list(BOUNDS)
MANY_SHORT = (67, 1, 2, 3, 5, 7, 11, 1, 1)
LENGTHS = [(1,), (1, 1, 1), (17,), (3, 3, 3, 5), (19, 19, 2, 2, 19), MANY_SHORT]
MaskRule = Callable[[int, int, Tensor, Tensor], Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: two wait for each other at every layer when other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(result: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Check against float64, or against float32 where transformers computes nothing more precise."""
    bound = BOUNDS[dtype or result.dtype]
    assert result.shape == expected.shape
    wrong, right = (result.double() - expected.double()).flatten(1), expected.double().flatten(1)
    assert wrong.norm() <= bound * right.norm()
    assert (wrong.norm(dim=1) <= 4 * bound * right.norm(dim=1)).all()


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], rule: MaskRule, scale: float, shared: int = 0
) -> Tensor:
    """Compute attention in float64 per sequence. The first `shared` rows of k and v precede every sequence."""
    groups, outs = q.shape[1] // k.shape[1], []
    k, v = (x.double().repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
    start = 0
    for length in lengths:
        keys = torch.cat([torch.arange(shared), shared + torch.arange(start, start + length)])
        query = torch.arange(shared, shared + length)[:, None]
        mask = rule(0, 0, query, torch.arange(shared + length)[None]).expand(length, -1)
        queries = q[start : start + length].double().transpose(0, 1)
        outs.append(F.scaled_dot_product_attention(queries, k[:, keys], v[:, keys], mask, scale=scale))
        start += length
    return torch.cat(outs, dim=1).transpose(0, 1)


ATTENTION = [
    # causal, window, transformers' own rule for it
    (False, None, bidirectional_mask_function),
    (True, None, causal_mask_function),
    (True, 1, sliding_window_causal_mask_function(1)),
    (True, 5, sliding_window_causal_mask_function(5)),
    (True, 40, sliding_window_causal_mask_function(40)),
]
RULES = [f"{'causal' if causal else 'both ways'} {window or ''}" for causal, window, _ in ATTENTION]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("causal", "window", "rule"), ATTENTION, ids=RULES)
def test_attention_masks_match_transformers(
    lengths: tuple[int, ...], causal: bool, window: int | None, rule: MaskRule
) -> None:
    tokens = sum(lengths)
    q, k, v = random(tokens, 6, 16), random(tokens, 2, 16, seed=1), random(tokens, 2, 16, seed=2)
    result = ops.varlen_attention(q, k, v, Packed.from_lengths(lengths), causal, window, scale=0.3)
    assert_close(result, attend(q, k, v, lengths, rule, 0.3))


def edges(window: int) -> tuple[int, ...]:
    """Return lengths around the ends of blocks of `window` queries, with two equal neighbors."""
    around = {times * window + more for times in (1, 2, 3) for more in (-1, 0, 1)} - {0}
    return (*around, window + 1, window + 1, 1, 1)


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_causal_window_at_block_edges(window: int, heads: tuple[int, int]) -> None:
    lengths = edges(window)
    tokens = sum(lengths)
    q = random(tokens, heads[0], 10)
    k, v = (random(tokens, heads[1], 10, seed=seed) for seed in (1, 2))
    result = ops.varlen_attention(q, k, v, Packed.from_lengths(lengths), True, window, 0.3)
    assert_close(result, attend(q, k, v, lengths, sliding_window_causal_mask_function(window), 0.3))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(1, 45)),
    st.sampled_from([(1, 1), (2, 1), (6, 2), (3, 3)]),
)
def test_any_lengths_and_window(lengths: list[int], window: int | None, heads: tuple[int, int]) -> None:
    tokens = sum(lengths)
    q = random(tokens, heads[0], 6)
    k, v = (random(tokens, heads[1], 6, seed=seed) for seed in (1, 2))
    packed = Packed.from_lengths(lengths)
    rule = sliding_window_causal_mask_function(window) if window else causal_mask_function
    expected = attend(q, k, v, lengths, rule, 0.4)
    assert_close(ops.varlen_attention(q, k, v, packed, True, window, 0.4), expected)
    last = packed.cu_seqlens[1:].long() - 1
    assert_close(ops.pooled_attention(q, k, v, packed, last, window, 0.4), expected[last])


@pytest.mark.parametrize("window", [None, 1, 5, 40, 67, 68, 1000])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_pooled_last_row_of_a_causal_sequence(lengths: tuple[int, ...], window: int | None) -> None:
    tokens, packed = sum(lengths), Packed.from_lengths(lengths)
    q, k, v = random(tokens, 6, 16), random(tokens, 2, 16, seed=1), random(tokens, 2, 16, seed=2)
    rule = sliding_window_causal_mask_function(window) if window else causal_mask_function
    last = packed.cu_seqlens[1:].long() - 1
    result = ops.pooled_attention(q, k, v, packed, last, window, 0.3)
    assert_close(result, attend(q, k, v, lengths, rule, 0.3)[last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooled_row", ["first", "last", "any"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 64), (4, 2, 80), (5, 1, 10)], ids=str)
def test_pooled_row_of_a_bidirectional_sequence(
    heads: int, kv_heads: int, head_dim: int, pooled_row: str, dtype: torch.dtype
) -> None:
    lengths = (19, 19, *MANY_SHORT, 2, 2)
    tokens, scale, packed = sum(lengths), head_dim**-0.5, Packed.from_lengths(lengths)
    q = random(tokens, heads, head_dim, dtype=dtype)
    k, v = (random(tokens, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    offsets = {"first": [0] * len(lengths), "last": [n - 1 for n in lengths], "any": [7 * n // 11 for n in lengths]}
    rows = packed.cu_seqlens[:-1].long() + torch.tensor(offsets[pooled_row])
    result = ops.pooled_attention(q, k, v, packed, rows, None, scale)
    assert result.dtype == dtype
    assert_close(result, attend(q, k, v, lengths, bidirectional_mask_function, scale)[rows])


def test_pooled_row_reads_views_of_one_projection() -> None:
    q, k, v = random(sum(MANY_SHORT), 3, 4, 16).unbind(1)
    packed = Packed.from_lengths(MANY_SHORT)
    rows = packed.cu_seqlens[:-1].long()
    result = ops.pooled_attention(q, k, v, packed, rows, None, 0.25)
    assert_close(result, attend(q, k, v, MANY_SHORT, bidirectional_mask_function, 0.25)[rows])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any torch operation returns, also inside attention."""

    elements = 0

    def __torch_dispatch__(self, func: Callable[..., object], types: object, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, tuple | list) else (outputs,):
            self.elements = max(self.elements, output.numel() if isinstance(output, Tensor) else 0)
        return outputs


@pytest.mark.parametrize("window", [None, 64], ids=["all", "window"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
def test_memory_is_not_quadratic_in_the_length(heads: tuple[int, int], window: int | None) -> None:
    """Check that no operation returns many more values than the output has; a mask would have 62 times as many."""
    length, head_dim = 2_001, 8
    q = random(length, heads[0], head_dim)
    k, v = (random(length, heads[1], head_dim, seed=seed) for seed in (1, 2))
    with torch.inference_mode(), Largest() as largest:
        result = ops.varlen_attention(q, k, v, Packed.from_lengths([length]), True, window, 0.4)
    assert 0 < largest.elements <= 3 * result.numel()
    seen = window or length
    expected = attend(q[-seen:], k[-seen:], v[-seen:], [seen], causal_mask_function, 0.4)[-1:]
    assert_close(result[-1:], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 64), (5, 1, 80), (4, 2, 128), (12, 12, 32), (3, 3, 10)], ids=str
)
def test_attention_in_every_dtype_and_head_layout(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    tokens, scale = sum(MANY_SHORT), head_dim**-0.5
    q = random(tokens, heads, head_dim, dtype=dtype)
    k, v = (random(tokens, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    result = ops.varlen_attention(q, k, v, Packed.from_lengths(MANY_SHORT), True, None, scale)
    assert result.dtype == dtype
    assert_close(result, attend(q, k, v, MANY_SHORT, causal_mask_function, scale))


@pytest.mark.parametrize(("causal", "window", "rule"), ATTENTION, ids=RULES)
def test_attention_after_a_shared_prefix(causal: bool, window: int | None, rule: MaskRule) -> None:
    lengths, shared = (4, 4, 1, 23), 9
    tokens = sum(lengths)
    q = random(tokens, 6, 16)
    k, v = (random(shared + tokens, 3, 16, seed=seed) for seed in (1, 2))
    result = ops.varlen_attention(
        q,
        k[shared:],
        v[shared:],
        Packed.from_lengths(lengths),
        causal,
        window,
        0.25,
        prefix=(k[:shared], v[:shared]),
    )
    assert_close(result, attend(q, k, v, lengths, rule, 0.25, shared))


def test_attention_reads_views_of_one_projection() -> None:
    """Pass q, k and v as strided views of one tensor, of which only the last dimension is contiguous."""
    tokens = sum(MANY_SHORT)
    q, k, v = random(tokens, 3, 4, 16).unbind(1)
    result = ops.varlen_attention(q, k, v, Packed.from_lengths(MANY_SHORT), False, None, 0.25)
    assert_close(result, attend(q, k, v, MANY_SHORT, bidirectional_mask_function, 0.25))


def _rotated(norms: tuple[nn.Module, nn.Module] | None, qkv: Tensor, heads: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return q and k [T,heads,D] of a fused projection in float32, normalized by transformers' modules."""
    q, k, _ = qkv.float().unflatten(1, (heads[0] + 2 * heads[1], -1)).split([heads[0], heads[1], heads[1]], dim=1)
    return (norms[0](q), norms[1](k)) if norms else (q, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
def test_rotary_positions_of_qwen3(normed: bool, dtype: torch.dtype) -> None:
    heads, head_dim, tokens = (6, 2), 24, 29
    config = Qwen3Config(
        hidden_size=60,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        rms_norm_eps=1e-3,
    )
    attention, rotary = qwen3.Qwen3Attention(config, 0), qwen3.Qwen3RotaryEmbedding(config)
    norms = (attention.q_norm, attention.k_norm)
    for seed, norm in enumerate(norms):
        norm.weight.data = random(head_dim, dtype=dtype, seed=seed).float()
    qkv = random(tokens, sum(heads) * head_dim + heads[1] * head_dim, dtype=dtype)
    position = torch.cat([torch.arange(20), torch.tensor([511]), torch.arange(8)])
    q, k = _rotated(norms if normed else None, qkv, heads)
    expected = qwen3.apply_rotary_pos_emb(q, k, *(x[0] for x in rotary(q, position[None])))

    cos, sin = (x[0, :, : head_dim // 2] for x in rotary(q, position[None]))
    weights = [norm.weight.data.to(dtype) for norm in norms] if normed else [None, None]
    in_place = qkv.clone()
    result = ops.qk_norm_rope_(in_place, heads, cos, sin, *weights, 1e-3)
    assert result.data_ptr() == in_place.data_ptr()
    size = sum(heads) * head_dim
    assert_close(in_place[:, :size], torch.cat(expected, dim=1).flatten(1))
    assert torch.equal(in_place[:, size:], qkv[:, size:])


@pytest.mark.parametrize("sections", [(4, 6, 6), (1, 2, 13)], ids=str)
def test_rotary_positions_of_qwen2_vl_text(sections: tuple[int, int, int]) -> None:
    heads, head_dim, tokens = (4, 2), 32, 31
    config = Qwen2VLTextConfig(
        hidden_size=heads[0] * head_dim,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)},
    )
    rotary = qwen2_vl.Qwen2VLRotaryEmbedding(config)
    qkv = random(tokens, (heads[0] + 2 * heads[1]) * head_dim)
    pos = torch.randint(0, 90, (3, tokens), generator=torch.Generator().manual_seed(5))
    q, k = _rotated(None, qkv, heads)
    expected = qwen2_vl.apply_rotary_pos_emb(q, k, *(x[0] for x in rotary(q, pos[:, None])))

    cos, sin = (x[0, :, : head_dim // 2] for x in rotary(q, pos[:, None]))
    result = ops.qk_norm_rope_(qkv.clone(), heads, cos, sin, None, None, 0.0)
    assert_close(result[:, : sum(heads) * head_dim], torch.cat(expected, dim=1).flatten(1))


def test_rotary_positions_of_qwen2_vl_vision() -> None:
    head_dim, heads, tokens = 80, 3, 24
    config = Qwen2VLVisionConfig(embed_dim=heads * head_dim, num_heads=heads)
    rotary = qwen2_vl.Qwen2VLVisionRotaryEmbedding(config)
    qkv = random(tokens, 3 * heads * head_dim)
    row, column = torch.arange(tokens) // 6, torch.arange(tokens) % 6
    q, k = _rotated(None, qkv, (heads, heads))
    expected = qwen2_vl.apply_rotary_pos_emb_vision(q, k, *rotary(q, torch.stack([row, column], dim=1)))

    cos, sin = (x[:, : head_dim // 2] for x in rotary(q, torch.stack([row, column], dim=1)))
    result = ops.qk_norm_rope_(qkv.clone(), (heads, heads), cos, sin, None, None, 0.0)
    assert_close(result[:, : 2 * heads * head_dim], torch.cat(expected, dim=1).flatten(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (7, 1), (13, 60), (3, 1031)], ids=str)
@pytest.mark.parametrize("summed", [True, False], ids=["residual", "alone"])
def test_rms_norm(shape: tuple[int, int], summed: bool, dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=dtype, seed=1)
    residual = random(*shape, dtype=dtype, seed=2) if summed else None
    norm = qwen3.Qwen3RMSNorm(shape[1], eps=1e-3)
    norm.weight.data = weight.float()
    total = x if residual is None else x + residual
    result, carried = ops.add_rms_norm(x, residual, weight, 1e-3)
    assert torch.equal(carried, total)
    assert result.dtype == dtype
    assert_close(result, norm(total.float()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (7, 3), (13, 60), (3, 1031)], ids=str)
@pytest.mark.parametrize("summed", [True, False], ids=["residual", "alone"])
def test_layer_norm(shape: tuple[int, int], summed: bool, dtype: torch.dtype) -> None:
    x, weight, bias = random(*shape, dtype=dtype), *(random(shape[1], dtype=dtype, seed=s) for s in (1, 2))
    residual = random(*shape, dtype=dtype, seed=3) if summed else None
    norm = nn.LayerNorm(shape[1], eps=1e-3, dtype=torch.float64)
    norm.weight.data, norm.bias.data = weight.double(), bias.double()
    result, total = ops.add_layer_norm(x, residual, weight, bias, 1e-3)
    assert result.dtype == total.dtype == dtype
    assert torch.equal(total, x if residual is None else x + residual)
    assert_close(result, norm(total.double()))
    for result in ops.post_layer_norm(x, residual, weight, bias, 1e-3):
        assert result.dtype == dtype
        assert_close(result, norm(total.double()))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_norm_adds_the_selected_residual_rows(index: torch.dtype) -> None:
    x, residual, weight, bias = random(3, 8), random(7, 8, seed=1), random(8, seed=2), random(8, seed=3)
    rows = torch.tensor([6, 0, 2], dtype=index)
    total = x.double() + torch.stack([residual[6], residual[0], residual[2]]).double()
    rms = nn.RMSNorm(8, eps=1e-3, dtype=torch.float64)
    layer = nn.LayerNorm(8, eps=1e-3, dtype=torch.float64)
    rms.weight.data, layer.weight.data, layer.bias.data = weight.double(), weight.double(), bias.double()
    for result, expected in (
        (ops.add_rms_norm(x, residual, weight, 1e-3, rows), rms(total)),
        (ops.add_layer_norm(x, residual, weight, bias, 1e-3, rows), layer(total)),
    ):
        assert_close(result[0], expected)
        assert_close(result[1], total)
    for result in ops.post_layer_norm(x, residual, weight, bias, 1e-3, rows):
        assert_close(result, layer(total))


@pytest.mark.parametrize("typed", [True, False], ids=["types", "type 0"])
def test_embeddings_of_bert(typed: bool) -> None:
    config = BertConfig(vocab_size=53, hidden_size=24, num_attention_heads=2, max_position_embeddings=37)
    torch.manual_seed(0)
    theirs = BertEmbeddings(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_()
    ids, pos = torch.tensor([[0, 52, 7, 7, 1]]), torch.tensor([[0, 1, 36, 0, 5]])
    types = torch.tensor([[0, 1, 1, 0, 1]]) if typed else None
    expected = theirs(input_ids=ids, position_ids=pos, token_type_ids=types)[0]
    tables = (
        table.weight.data
        for table in (theirs.word_embeddings, theirs.position_embeddings, theirs.token_type_embeddings)
    )
    norm = theirs.LayerNorm
    result = ops.embed_layer_norm(
        ids[0], pos[0], None if types is None else types[0], *tables, norm.weight.data, norm.bias.data, norm.eps
    )
    assert_close(result, expected.detach())


# ours -> transformers' name
ACTIVATIONS = {
    "gelu_erf": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}


def test_every_activation_is_tested() -> None:
    assert set(ACTIVATIONS) == set(kernels.ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str, dtype: torch.dtype) -> None:
    x = torch.cat([3 * random(5, 31, dtype=dtype), torch.full((1, 31), 20.0, dtype=dtype)])
    assert_close(ops.activation(x, kind), ACT2FN[ACTIVATIONS[kind]](x.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_activation(dtype: torch.dtype) -> None:
    gate, up = random(7, 31, dtype=dtype), random(7, 31, dtype=dtype, seed=1)
    expected = ACT2FN["silu"](gate.double()) * up.double()
    # Two roundings in low precision: the activation's and the product's.
    assert_close(ops.gated_activation(torch.cat([gate, up], dim=1)), expected)


# ours -> sentence-transformers' name
POOLINGS = {"cls": "cls", "mean": "mean", "last": "lasttoken", "max": "max"}


def test_every_pooling_is_tested() -> None:
    assert set(POOLINGS) == set(POOLING_MODES)


def pooled(x: Tensor, lengths: Sequence[int], mode: str) -> Tensor:
    """Pool with sentence-transformers in float64 over the padded batch, with large values in the padding."""
    padded = torch.full((len(lengths), max(lengths), x.shape[1]), 1e3, dtype=torch.float64)
    mask = torch.zeros(padded.shape[:2], dtype=torch.int64)
    for row, part in enumerate(x.double().split(list(lengths))):
        padded[row, : len(part)] = part
        mask[row, : len(part)] = 1
    pooling = Pooling(x.shape[1], pooling_mode=POOLINGS[mode])
    result: Tensor = pooling({"token_embeddings": padded, "attention_mask": mask})["sentence_embedding"]
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pooling(mode: str, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(sum(lengths), 60, dtype=dtype)
    result = ops.segment_pool(x, Packed.from_lengths(lengths), mode, [60] * len(lengths), l2=False)
    assert result.dtype == torch.float32
    assert_close(result, pooled(x, lengths, mode), torch.float32)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_each_row_is_truncated_to_its_size_and_normalized(mode: str) -> None:
    lengths, dims = (3, 3, 1, 41, 2), (60, 1, 20, 7, 59)
    x = 1e-3 * random(sum(lengths), 60, dtype=torch.bfloat16)  # short vectors: an absolute epsilon would show
    result = ops.segment_pool(x, Packed.from_lengths(lengths), mode, dims)
    for row, size, full_vector in zip(result, dims, pooled(x, lengths, mode), strict=True):
        expected = normalize_embeddings(truncate_embeddings(full_vector[None], size))
        assert_close(row[None, :size], expected)
        assert abs(np.linalg.norm(row[:size].double().numpy()) - 1) <= 1e-6
        assert not row[size:].any()


def test_final_norm_precedes_truncation() -> None:
    lengths, dims = (5, 1, 7), (12, 24, 3)
    x, norm = random(13, 24), nn.LayerNorm(24).requires_grad_(False)
    result = ops.segment_pool(x, Packed.from_lengths(lengths), "last", dims, norm)
    for row, size, full_vector in zip(result, dims, norm(pooled(x, lengths, "last").float()), strict=True):
        assert_close(row[None, :size], normalize_embeddings(truncate_embeddings(full_vector[None], size)))


@pytest.mark.parametrize("size", [10, 31])
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_projection_may_change_the_size(mode: str, size: int) -> None:
    """Project with sentence-transformers' Dense, after pooling and before truncation and normalization."""
    lengths, dims = (5, 5, 1, 7), (size, 3, 1, size - 1)
    x = random(sum(lengths), 24, dtype=torch.bfloat16)
    theirs = Dense(24, size).requires_grad_(False).double()
    inputs = []

    def norm(pooled: Tensor) -> Tensor:
        inputs.append(pooled)
        return theirs({"sentence_embedding": pooled.double()})["sentence_embedding"]

    result = ops.segment_pool(x, Packed.from_lengths(lengths), mode, dims, norm)
    assert [(x.dtype, x.shape) for x in inputs] == [(torch.float32, (4, 24))]
    assert (result.dtype, result.shape) == (torch.float32, (4, size))
    expected = theirs({"sentence_embedding": pooled(x, lengths, mode)})["sentence_embedding"]
    for row, dim, full in zip(result, dims, expected, strict=True):
        assert_close(row[None, :dim], normalize_embeddings(truncate_embeddings(full[None], dim)))
        assert not row[dim:].any()


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_nan_stays_inside_its_sequence(mode: str) -> None:
    """Run a sequence of NaN through every op of a layer, next to sequences of equal and other lengths."""
    lengths = (4, 4, 4, 1, 9)
    packed = Packed.from_lengths(lengths)
    weight, bias = ops.pack_linear(random(3 * 16, 16)), random(3 * 16, seed=1)

    def embed(x: Tensor) -> Tensor:
        qkv = ops.linear(x, weight, bias, "gelu_erf")
        q, k, v = qkv.view(len(x), 3, 2, 8).unbind(1)
        y = ops.varlen_attention(q, k, v, packed, False, None, 1.0).flatten(1)
        return ops.segment_pool(
            ops.post_layer_norm(y, None, torch.ones(16), torch.zeros(16), 1e-5)[0], packed, mode, [16] * 5
        )

    x = random(sum(lengths), 16)
    poisoned = x.clone()
    poisoned[4:8] = float("nan")
    clean, result = embed(x), embed(poisoned)
    others = [0, 2, 3, 4]
    assert result[1].isnan().all()
    assert torch.equal(result[others], clean[others])


def _image(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("height", "width", "patch", "merge", "frames"),
    [(28, 28, 14, 2, 2), (56, 84, 14, 2, 2), (28, 14, 14, 1, 2), (30, 18, 2, 3, 1), (5, 5, 5, 1, 3)],
)
def test_patches_of_qwen2_vl(height: int, width: int, patch: int, merge: int, frames: int) -> None:
    image = _image(height, width)
    theirs = Qwen2VLImageProcessorPil(do_resize=False, patch_size=patch, merge_size=merge, temporal_patch_size=frames)
    expected = theirs(images=image.numpy(), return_tensors="pt")["pixel_values"]
    result = ops.patchify(image, patch, merge, frames, torch.tensor(theirs.image_mean), torch.tensor(theirs.image_std))
    assert_close(result, expected)


@pytest.mark.parametrize("patch", [4, 7])
def test_patches_of_clip(patch: int) -> None:
    """Compare CLIP's convolution with our rows times its flattened kernel, which are the same sums."""
    image, size = _image(28, 28), 28
    config = CLIPVisionConfig(hidden_size=10, image_size=size, patch_size=patch, num_attention_heads=2)
    torch.manual_seed(0)
    theirs = CLIPVisionEmbeddings(config).requires_grad_(False)
    theirs.patch_embedding.weight.normal_()
    theirs.position_embedding.weight.zero_()
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    expected = theirs(processor(images=image.numpy(), return_tensors="pt")["pixel_values"])[0, 1:]
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    result = ops.patchify(image, patch, 1, 1, mean, std) @ theirs.patch_embedding.weight.flatten(1).T
    assert_close(result, expected)


def _attention(
    q: tuple[int, ...] = (5, 4, 8),
    k: tuple[int, ...] = (5, 2, 8),
    v: tuple[int, ...] = (5, 2, 8),
    lengths: Sequence[int] = (2, 3),
    causal: bool = True,
    window: int | None = None,
    prefix: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> Tensor:
    shared = None if prefix is None else (torch.zeros(prefix[0]), torch.zeros(prefix[1]))
    q_, k_, v_ = (torch.zeros(shape) for shape in (q, k, v))
    return ops.varlen_attention(q_, k_, v_, Packed.from_lengths(lengths), causal, window, 1.0, shared)


def _pooled_attention(
    q: tuple[int, ...] = (5, 4, 8),
    k: tuple[int, ...] = (5, 2, 8),
    v: tuple[int, ...] = (5, 2, 8),
    lengths: Sequence[int] = (2, 3),
    window: int | None = None,
    rows: Sequence[int] = (1, 4),
    prefix: tuple[int, ...] | None = None,
) -> Tensor:
    q_, k_, v_ = (torch.zeros(shape) for shape in (q, k, v))
    shared = None if prefix is None else (torch.zeros(prefix), torch.zeros(prefix))
    return ops.pooled_attention(q_, k_, v_, Packed.from_lengths(lengths), torch.tensor(rows), window, 1.0, shared)


def _rotary(width: int = 32, cos: tuple[int, int] = (5, 4), sin: tuple[int, int] = (5, 4)) -> Tensor:
    return ops.qk_norm_rope_(torch.zeros(5, width), (2, 1), torch.zeros(cos), torch.zeros(sin), None, None, 0.0)


def _pool(
    mode: str = "mean",
    lengths: Sequence[int] = (2, 3),
    dims: Sequence[int] = (8, 8),
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    return ops.segment_pool(torch.zeros(5, 8), Packed.from_lengths(lengths), mode, dims, project)


def _patches(shape: tuple[int, ...]) -> Tensor:
    image = torch.zeros(shape, dtype=torch.uint8)
    return ops.patchify(image, 4, 2, 1, torch.zeros(3), torch.ones(3))


five, eight, nine = torch.zeros(5, 8), torch.ones(8), torch.ones(9)
WRONG: dict[str, Callable[[], object]] = {
    "q of 2 dimensions": lambda: _attention(q=(5, 32)),
    "k and v differ": lambda: _attention(v=(5, 1, 8)),
    "k of other tokens": lambda: _attention(k=(6, 2, 8), v=(6, 2, 8)),
    "k of another head size": lambda: _attention(k=(5, 2, 16), v=(5, 2, 16)),
    "heads that do not divide": lambda: _attention(q=(5, 3, 8)),
    "lengths of other tokens": lambda: _attention(lengths=(2, 2)),
    "a window of nothing": lambda: _attention(window=0),
    "a window that looks both ways": lambda: _attention(window=2, causal=False),
    "a prefix of other heads": lambda: _attention(prefix=((3, 1, 8), (3, 1, 8))),
    "a prefix of another head size": lambda: _attention(prefix=((3, 2, 4), (3, 2, 4))),
    "pooled rows of 2 dimensions": lambda: _pooled_attention(q=(5, 32)),
    "pooled rows of other sequences": lambda: _pooled_attention(rows=(0, 2, 4)),
    "pooled rows of other queries": lambda: _pooled_attention(q=(2, 4, 8)),
    "pooled rows behind a prefix of other heads": lambda: _pooled_attention(prefix=(3, 1, 8)),
    "pooled rows over a k of other tokens": lambda: _pooled_attention(k=(6, 2, 8), v=(6, 2, 8)),
    "pooled rows over a k of another head size": lambda: _pooled_attention(k=(5, 2, 4), v=(5, 2, 4)),
    "pooled rows over k and v that differ": lambda: _pooled_attention(v=(5, 1, 8)),
    "pooled rows of heads that do not divide": lambda: _pooled_attention(q=(5, 3, 8)),
    "pooled rows of lengths of other tokens": lambda: _pooled_attention(lengths=(2, 2)),
    "pooled rows with a window of nothing": lambda: _pooled_attention(window=0),
    "a qkv that heads do not divide": lambda: _rotary(width=33),
    "heads without halves": lambda: _rotary(width=36, cos=(5, 4), sin=(5, 4)),
    "angles of other tokens": lambda: _rotary(cos=(4, 4), sin=(4, 4)),
    "angles of whole heads": lambda: _rotary(cos=(5, 8), sin=(5, 8)),
    "cosines and sines that differ": lambda: _rotary(sin=(5, 2)),
    "queries and keys of two dtypes": lambda: ops.varlen_attention(
        torch.zeros(5, 4, 8), *[torch.zeros(5, 2, 8).half()] * 2, Packed.from_lengths([5]), False, None, 1.0
    ),
    "queries and keys on two devices": lambda: ops.varlen_attention(
        torch.zeros(5, 4, 8), *[torch.zeros(5, 2, 8, device="meta")] * 2, Packed.from_lengths([5]), False, None, 1.0
    ),
    "a residual of another dtype": lambda: ops.add_rms_norm(five, five.half(), eight, 1e-5),
    "rows of no residual": lambda: ops.add_rms_norm(five, None, eight, 1e-5, torch.zeros(5, dtype=torch.long)),
    "rows of another number": lambda: ops.add_rms_norm(five, five, eight, 1e-5, torch.zeros(4, dtype=torch.long)),
    "an rms residual of another shape": lambda: ops.add_rms_norm(five, torch.zeros(4, 8), eight, 1e-5),
    "an rms weight of another size": lambda: ops.add_rms_norm(five, None, nine, 1e-5),
    "a residual of another shape": lambda: ops.add_layer_norm(five, torch.zeros(5, 1), eight, eight, 1e-5),
    "a norm weight of another size": lambda: ops.add_layer_norm(five, None, nine, nine, 1e-5),
    "positions and ids differ": lambda: ops.embed_layer_norm(
        torch.zeros(3, dtype=torch.long), torch.zeros(1, dtype=torch.long), None, five, five, five, eight, eight, 1.0
    ),
    "an odd gate": lambda: ops.gated_activation(torch.zeros(2, 7)),
    "an unknown activation": lambda: ops.activation(five, "gelu"),
    "an unknown pooling": lambda: _pool(mode="weightedmean"),
    "pooling lengths of other tokens": lambda: _pool(lengths=(2, 2)),
    "dims of other rows": lambda: _pool(dims=(8,)),
    "dims beyond the vector": lambda: _pool(dims=(8, 9)),
    "dims of nothing": lambda: _pool(dims=(8, 0)),
    "dims of nothing after a map": lambda: _pool(dims=(8, 0), project=nn.Identity()),
    "dims of other rows after a map": lambda: _pool(dims=(8,), project=nn.Identity()),
    "an image of 2 dimensions": lambda: _patches((8, 8)),
    "a height without whole blocks": lambda: _patches((12, 8, 3)),
    "a width without whole blocks": lambda: _patches((8, 7, 3)),
}


@pytest.mark.parametrize("case", WRONG)
def test_shapes_that_do_not_fit_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        WRONG[case]()


def test_torch_without_openmp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the import of the loops fail as it does where torch's library lacks the symbol."""
    monkeypatch.delattr("triton_embed.kernels.cpu.backend")
    for name in [name for name in sys.modules if name.startswith("triton_embed.kernels.cpu.")]:
        if not name.endswith("simd"):  # it registers types, and does not need OpenMP
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch._C, "__file__", ctypes.util.find_library("m"))
    with pytest.raises(ValueError, match="has no OpenMP for loops to run on; set the parameter kernels to reference"):
        backend.choose("auto", "cpu", torch.float32)
    assert backend.choose("reference", "cpu", torch.float32).name == "reference"


@pytest.mark.parametrize(
    ("setting", "device", "name"),
    [("auto", "cpu", "cpu"), ("auto", "cuda:0", "triton"), ("reference", "cuda:0", "reference")],
)
def test_setting_and_device_determine_the_backend(setting: str, device: str, name: str) -> None:
    assert backend.resolve(setting, device) == name


def test_unknown_setting_and_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="'cuda' is none of auto, reference, triton"):
        backend.resolve("cuda", "cpu")
    with pytest.raises(ValueError, match=r"no kernel computes in torch\.float64"):
        backend.choose("auto", "cpu", torch.float64)


@pytest.mark.parametrize("setting", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_residual_on_a_cpu_is_fp32(setting: str, dtype: torch.dtype) -> None:
    x = random(3, 8, dtype=dtype)
    residual = Ops.on("cpu", dtype, setting).first_residual(x)
    assert residual.dtype == (torch.float32 if onednn.supports(dtype) else dtype)
    assert torch.equal(residual, x.to(residual.dtype))
