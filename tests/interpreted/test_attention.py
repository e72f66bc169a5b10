"""Interpreted attention kernels against kernels/reference.py in float64 (see tests/test_ops.py).

Blocks are small, so that lengths around their edges are cheap. q, k and v are views of one guarded projection.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import CANARY, DTYPES, assert_close, guarded, random
from triton_embed.kernels import reference
from triton_embed.kernels.gpu import attention
from triton_embed.kernels.gpu.blocks import Config
from triton_embed.kernels.packed import Packed

SMALL = Config(block_m=16, block_n=16)
AROUND_BLOCKS = (15, 16, 17, 1, 34, 1, 2)
MASKS = [(False, None), (True, None), (True, 1), (True, 5), (True, 20)]  # causal, window
MASK_NAMES = [f"{'causal' if causal else 'bidirectional'} {window or ''}" for causal, window in MASKS]
LAYOUTS = [(1, 1, 64), (6, 1, 80), (7, 1, 16), (2, 1, 128)]  # heads, key heads, head size
Prefix = tuple[Tensor, Tensor] | None


def projected(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Create q, k and v as the engine does: strided views of one projection, guarded."""
    qkv = guarded(random(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype))
    return list(qkv.split([heads, kv_heads, kv_heads], dim=1))


def random_prefix(
    count: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    k, v = guarded(random(count, 2 * kv_heads, head_dim, dtype=dtype, seed=1)).split(kv_heads, dim=1)
    return k, v


def to_float64(prefix: Prefix) -> Prefix:
    return None if prefix is None else (prefix[0].double(), prefix[1].double())


def check_varlen(
    qkv: Sequence[Tensor],
    lengths: Sequence[int],
    causal: bool,
    window: int | None,
    prefix: Prefix = None,
    config: Config | None = SMALL,
    scale: float = 0.25,
) -> None:
    """Check one batch against float64 and, in half precision, against torch in the same dtype."""
    arguments = Packed.from_lengths(lengths), causal, window, scale
    result = attention.varlen_attention(*qkv, *arguments, prefix, config)
    torch_result = reference.varlen_attention(*qkv, *arguments, prefix) if result.dtype != torch.float32 else None
    assert result.dtype == qkv[0].dtype
    assert_close(
        result, reference.varlen_attention(*(x.double() for x in qkv), *arguments, to_float64(prefix)), torch_result
    )


def check_layout(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, causal: bool, window: int | None
) -> None:
    qkv = projected(sum(AROUND_BLOCKS), heads, kv_heads, head_dim, dtype)
    config = replace(SMALL, block_m=64) if heads > 2 * kv_heads else SMALL
    check_varlen(qkv, AROUND_BLOCKS, causal, window, None, config, head_dim**-0.5)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), LAYOUTS, ids=str)
@pytest.mark.parametrize(("causal", "window"), MASKS, ids=MASK_NAMES)
def test_every_mask_and_head_layout(causal: bool, window: int | None, heads: int, kv_heads: int, head_dim: int) -> None:
    check_layout(heads, kv_heads, head_dim, torch.float32, causal, window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), LAYOUTS, ids=str)
def test_every_head_layout_in_half_precision(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    check_layout(heads, kv_heads, head_dim, dtype, True, 20)


@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_every_head_size(head_dim: int) -> None:
    lengths = (17, 1, 3)
    check_varlen(projected(sum(lengths), 2, 1, head_dim, torch.float32), lengths, True, None, scale=head_dim**-0.5)


@pytest.mark.parametrize("blocks", [(16, 16), (16, 32), (32, 16), (64, 64)], ids=str)
@pytest.mark.parametrize(
    "lengths", [(1,), (1, 1, 1), (32,), (33,), (31, 64, 65), (97, 1, 2, 3, 5, 1, 1), (3,) * 30], ids=str
)
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 33)], ids=str)
def test_lengths_around_the_edges_of_blocks(
    lengths: tuple[int, ...], blocks: tuple[int, int], causal: bool, window: int | None
) -> None:
    check_varlen(projected(sum(lengths), 1, 1, 16, torch.float32), lengths, causal, window, None, Config(*blocks))


@pytest.mark.parametrize("window", [15, 16, 17, 31, 32, 33, 64, 65, 100])
def test_windows_around_the_edges_of_blocks(window: int) -> None:
    check_varlen(projected(101, 2, 1, 16, torch.float32), (66, 35), True, window, config=Config(32, 16))


@pytest.mark.parametrize("group", [3, 5, 6, 7, 16, 20])
def test_groups_that_do_not_divide_a_block(group: int) -> None:
    """Test a group of 20 too, which needs a block larger than 16 rows."""
    lengths = (5, 1, 9)
    check_varlen(projected(15, group * 2, 2, 16, torch.float32), lengths, True, None)


@pytest.mark.parametrize("prefix_tokens", [1, 15, 16, 17, 40])
@pytest.mark.parametrize(("causal", "window"), [*MASKS, (True, 30)], ids=str)
def test_prefix_before_every_sequence(causal: bool, window: int | None, prefix_tokens: int) -> None:
    lengths = (1, 33, 2, 3)
    check_varlen(projected(39, 2, 1, 16, torch.float32), lengths, causal, window, random_prefix(prefix_tokens, 1, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 80), (6, 1, 64)], ids=str)
def test_prefix_in_every_dtype(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    qkv, prefix = projected(25, heads, kv_heads, head_dim, dtype), random_prefix(19, kv_heads, head_dim, dtype)
    check_varlen(qkv, (18, 7), True, None, prefix, scale=head_dim**-0.5)


def test_empty_prefix_equals_no_prefix() -> None:
    qkv, packed = projected(20, 2, 1, 16, torch.float32), Packed.from_lengths((17, 3))
    empty = (torch.zeros(0, 1, 16), torch.zeros(0, 1, 16))
    with_prefix = attention.varlen_attention(*qkv, packed, True, 5, 0.25, empty, SMALL)
    assert torch.equal(with_prefix, attention.varlen_attention(*qkv, packed, True, 5, 0.25, None, SMALL))
    rows = packed.cu_seqlens[1:] - 1
    pooled = attention.pooled_attention(*qkv, packed, rows, None, 0.25, empty, SMALL)
    assert torch.equal(pooled, attention.pooled_attention(*qkv, packed, rows, None, 0.25, None, SMALL))


def test_heads_may_have_any_stride() -> None:
    """Test tensors with heads before tokens, and different strides for k and v."""
    q, k = (guarded(random(heads, 35, 16, seed=heads)).transpose(0, 1) for heads in (4, 2))
    v = guarded(random(35, 2, 48))[..., 16:32]
    check_varlen([q, k, v], (33, 2), True, None)


def test_config_from_the_table() -> None:
    qkv, packed = projected(150, 4, 2, 64, torch.float16), Packed.from_lengths((129, 21))
    result = attention.varlen_attention(*qkv, packed, True, None, 0.125)
    assert_close(result, reference.varlen_attention(*(x.double() for x in qkv), packed, True, None, 0.125))
    assert list(packed._tiles) == [attention.tile_tokens(4, 2, 64, torch.float16, result.device)]


@pytest.mark.parametrize("level", [-3e4, 3e4])
def test_scores_far_from_zero(level: float) -> None:
    """Check that only differences of scores matter: at -30000, exp2 of a score is 0."""
    q, k, v = projected(40, 2, 1, 16, torch.float32)
    q[..., 0], k[..., 0] = level / 100, 100.0
    result = attention.varlen_attention(q, k, v, Packed.from_lengths((40,)), True, None, 1.0, None, SMALL)
    q[..., 0] = 0.0
    expected = reference.varlen_attention(*(x.double() for x in (q, k, v)), Packed.from_lengths((40,)), True, None, 1.0)
    assert (result - expected).abs().max() < 0.02  # fp32 holds scores of 30000 to within 0.002


@pytest.mark.parametrize("block_n", [16, 64], ids=["32 bits in a block", "64 bits in a block"])
def test_offsets_beyond_32_bits(block_n: int) -> None:
    """Test 40 rows with a stride of 64 million values, of which only the values in use are touched."""
    tokens, row = 40, 64_000_000
    buffer = torch.empty(tokens * row, dtype=torch.float16)
    qkv = buffer.as_strided((tokens, 4, 16), (row, 16, 1))
    qkv.copy_(random(tokens, 4, 16))
    views, lengths = list(qkv.split([2, 1, 1], dim=1)), (3, 37)
    check_varlen(views, lengths, True, None, config=Config(16, block_n))
    check_pooled(views, lengths, config=Config(16, block_n))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_nonfinite_token_affects_only_queries_that_see_it(head_dim: int, part: int, value: float, causal: bool) -> None:
    """Set the value in a tile that three sequences share, and in a sequence of several tiles."""
    lengths, nonfinite_tokens = (3, 5, 4, 40, 2), (5, 30)
    qkv = projected(54, 2, 1, head_dim, torch.float32)
    packed = Packed.from_lengths(lengths)
    before = attention.varlen_attention(*qkv, packed, causal, None, 0.25, None, SMALL)
    qkv[part][torch.tensor(nonfinite_tokens), :, head_dim - 3] = value
    after = attention.varlen_attention(*qkv, packed, causal, None, 0.25, None, SMALL)

    affected = torch.zeros(54, dtype=torch.bool)
    for token, start, end in ((5, 3, 8), (30, 12, 52)):
        affected[slice(token, token + 1) if part == 0 else slice(token if causal else start, end)] = True
    assert torch.equal(after[~affected], before[~affected])
    if value != value or part == 2:
        assert not after[affected].isfinite().all(dim=-1).any()

    rows = packed.cu_seqlens[1:] - 1
    pooled = attention.pooled_attention(*qkv, packed, rows, None, 0.25, None, SMALL)
    others = torch.tensor([0, 2, 4])
    assert pooled[others].isfinite().all()


def with_tiles(packed: Packed, tiles: Tensor, size: int) -> Packed:
    return Packed(packed.cu_seqlens, packed.lengths, _tiles={size: tiles.to(torch.int32)})


def test_empty_tiles_and_uncovered_tokens_are_not_written() -> None:
    qkv, packed = projected(40, 2, 1, 16, torch.float32), Packed.from_lengths((20, 4, 16))
    tiles = packed.tiles(8)
    full = attention.varlen_attention(*qkv, packed, True, None, 0.25, None, SMALL)
    covered_tiles, uncovered = tiles[:-1], slice(*tiles[-1, :2].tolist())
    padded = torch.cat([covered_tiles, torch.tensor([[0, 0, 0, 0], [40, 40, 0, 40], [1 << 30, 1 << 30, 0, 0]])])
    result = attention.varlen_attention(*qkv, with_tiles(packed, padded, 8), True, None, 0.25, None, SMALL)
    assert (result[uncovered].view(torch.uint8) == CANARY).all()
    result[uncovered] = full[uncovered]
    assert torch.equal(result, full)


def check_pooled(
    qkv: Sequence[Tensor],
    lengths: Sequence[int],
    window: int | None = None,
    prefix: Prefix = None,
    config: Config | None = SMALL,
    rows: Tensor | None = None,
) -> None:
    packed = Packed.from_lengths(lengths)
    rows = packed.cu_seqlens[1:] - 1 if rows is None else rows
    result = attention.pooled_attention(*qkv, packed, guarded(rows), window, 0.25, prefix, config)
    torch_result = (
        reference.pooled_attention(*qkv, packed, rows, window, 0.25, prefix) if result.dtype != torch.float32 else None
    )
    expected = reference.pooled_attention(*(x.double() for x in qkv), packed, rows, window, 0.25, to_float64(prefix))
    assert_close(result, expected, torch_result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [*LAYOUTS, (20, 1, 16)], ids=str)
@pytest.mark.parametrize("window", [None, 16, 20])
def test_one_query_per_sequence(
    window: int | None, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    check_pooled(projected(sum(AROUND_BLOCKS), heads, kv_heads, head_dim, dtype), AROUND_BLOCKS, window)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_query_may_be_any_row_of_a_sequence(dtype: torch.dtype) -> None:
    rows = torch.tensor([n // 2 for n in AROUND_BLOCKS]) + Packed.from_lengths(AROUND_BLOCKS).cu_seqlens[:-1]
    check_pooled(projected(86, 4, 2, 16, torch.float32), AROUND_BLOCKS, rows=rows.to(dtype))


@pytest.mark.parametrize("prefix_tokens", [1, 16, 19])
@pytest.mark.parametrize("window", [None, 1, 5, 20, 30, 60])
def test_one_query_after_a_prefix(window: int | None, prefix_tokens: int) -> None:
    prefix = random_prefix(prefix_tokens, 2, 16)
    check_pooled(projected(sum(AROUND_BLOCKS), 4, 2, 16, torch.float32), AROUND_BLOCKS, window, prefix)


def test_config_from_the_table_for_one_query() -> None:
    check_pooled(projected(150, 4, 2, 64, torch.bfloat16), (129, 21), config=None)


def test_empty_sequence_gives_zeros() -> None:
    """Pad a batch with empty sequences: repeated offsets, and rows that are never read."""
    qkv, random_kv = projected(20, 2, 1, 80, torch.float32), random_prefix(5, 1, 80)
    packed = Packed.from_lengths((17, 3))
    padded = replace(packed, cu_seqlens=guarded(torch.tensor([0, 17, 20, 20, 20], dtype=torch.int32)))
    rows = torch.tensor([16, 19, 1 << 30, -1])
    for prefix in (None, random_kv):
        result = attention.pooled_attention(*qkv, padded, rows, None, 0.25, prefix, SMALL)
        assert torch.equal(result[:2], attention.pooled_attention(*qkv, packed, rows[:2], None, 0.25, prefix, SMALL))
        assert not result[2:].any()


@pytest.mark.parametrize("head_dim", [8, 10, 72, 100, 272, 512])
def test_unsupported_head_size_is_rejected(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 16 up to 256, got {head_dim}"):
        attention.check_supported(4, 2, head_dim, torch.float16)
    with pytest.raises(ValueError, match=f"got {head_dim}"):
        check_varlen(projected(3, 2, 1, head_dim, torch.float32), (3,), True, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_unsupported_dtype_is_rejected(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
        attention.check_supported(4, 2, 64, dtype)


def test_uneven_head_groups_are_rejected() -> None:
    with pytest.raises(ValueError, match="multiple of the number of key heads, got 4 and 3"):
        attention.check_supported(4, 3, 64, torch.float16)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scale_that_is_not_positive_is_rejected(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be positive"):
        check_varlen(projected(3, 2, 1, 16, torch.float32), (3,), True, None, scale=scale)


def test_noncontiguous_values_are_rejected() -> None:
    q, _, v = projected(5, 2, 1, 16, torch.float32)
    with pytest.raises(ValueError, match=r"Attention needs k .* strides"):
        check_varlen([q, random(5, 1, 32)[..., ::2], v], (5,), True, None)


def test_mixed_dtypes_are_rejected() -> None:
    q, k, v = projected(5, 2, 1, 16, torch.float32)
    with pytest.raises(ValueError, match=r"Attention needs v .* got torch.float16"):
        check_varlen([q, k, v.half()], (5,), True, None)
