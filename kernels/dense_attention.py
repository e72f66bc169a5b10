"""Attention on a CPU as dense products over groups of sequences of about one length.

torch's own attention takes a call for each length, and most of its time goes by around the products. Here neighbours
of about one length are padded to one block, and a group is two batched products with exp2 between them: about twice as
fast in bf16, and for short texts in fp32 too.

The softmax subtracts no maximum. Keys are centred instead, which moves all scores of a query by the same amount, and
the sums tell whether exp2 stayed in range; where it did not, torch's attention does the group again.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from triton_embed.kernels.packed import Packed

PADDED = 1.25  # tokens of a group with its padding, at most, for each without,
FEW = 128  # but so few are padded to whatever length: one call is faster than several
CELLS = 2**22  # scores of a group, at most, unless one sequence has more: what stays in a cache
QUERIES = 256  # of each sequence at a time
LEAST_TOKENS = 96  # of a group: with fewer, torch's one call is faster than several
WIDE = 8_192  # length x head dim, above which torch's attention is faster in fp32
# Sums must stay below, or exp2 has left its range. A score keeps the dtype of the queries: in bf16 one of 32 is rounded
# by 1/16, as a power of 2 by 4 %. Encoders give scores near 100 to a token that takes all attention, where that is
# nothing; decoders give such scores to keys that compete.
LARGEST_SUM = {False: 2.0**110, True: 2.0**32}


@dataclass(frozen=True)
class Group:
    """Sequences that begin at token `first` and hold `tokens`, in a block of `count` of `length` tokens each.

    Where the block is larger than they are: `places` [count*length] is the packed token of each place of the block (one
    of theirs where there is none), `real` [count,1,1,length] tells the keys to see from padding, and `found` [tokens]
    is the place of each token.
    """

    first: int
    tokens: int
    count: int
    length: int
    places: Tensor | None = None
    real: Tensor | None = None
    found: Tensor | None = None

    @classmethod
    def of(cls, first: int, lengths: Sequence[int], count: int, length: int) -> "Group":
        tokens = sum(lengths)
        if count * length == tokens:
            return cls(first, tokens, count, length)
        # Sequences that are nobody's are copies of the last one's first token.
        sizes = torch.tensor([*lengths, *[1] * (count - len(lengths))])[:, None]
        starts = torch.tensor([*accumulate(lengths, initial=first)][: len(lengths)])[:, None]
        starts = torch.cat([starts, starts[-1:].expand(count - len(lengths), 1)])
        at = torch.arange(length)
        real = at < sizes
        places = (starts + torch.minimum(at, sizes - 1)).flatten()
        found = real[: len(lengths)].flatten().nonzero().flatten()
        return cls(first, tokens, count, length, places, real[:, None, None], found)


def groups(lengths: Sequence[int], heads: int, longest: int) -> list[Group]:
    """Neighbours of about one length together, in order; none longer than `longest` is padded.

    oneDNN takes a millisecond and half a megabyte for each shape that it meets for the first time, so there are few:
    blocks of 1, 2, 4, 8, … sequences, of lengths that are multiples of 8, 16 or 32.
    """
    found: list[Group] = []
    first = size = tokens = 0
    members: list[int] = []
    for length in lengths:
        grown = max(size, length)
        cells = (len(members) + 1) * grown
        padded = cells > tokens + length
        if members and (
            cells > max(FEW, PADDED * (tokens + length))
            or cells * grown * heads > CELLS
            or (padded and grown > longest)
        ):
            found += _blocks(first, members, longest)
            first, tokens, grown, members = first + tokens, 0, length, []
        members.append(length)
        size, tokens = grown, tokens + length
    return [*found, *_blocks(first, members, longest)]


def _blocks(first: int, lengths: Sequence[int], longest: int) -> Iterator[Group]:
    """Sequences of about one length in blocks of known sizes; if one is an eighth too large, so be it."""
    while lengths:
        count = 1 << (len(lengths).bit_length() - 1)
        if len(lengths) >= 7 / 4 * count:
            count *= 2
        some, lengths = lengths[:count], lengths[count:]
        length = max(some)
        if length > longest:
            yield Group.of(first, some, len(some), length)
        else:
            step = 8 if length <= 64 else 16 if length <= 128 else 32
            yield Group.of(first, some, count, -(-length // step) * step)
        first += sum(some)


def attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, causal: bool, scale: float) -> Tensor:
    """q [T,H,D], k and v [T,G,D] -> [T,H,D], as `ops.varlen_attention` without window and prefix."""
    if len(packed.lengths) == packed.fillers + 1 and len(q) < LEAST_TOKENS:
        own = packed.lengths[0]  # what fillers see besides does not matter
        q, k, v = (x[None].transpose(1, 2) for x in (q, k[:own], v[:own]))
        return _attend_exactly(q, k, v, None, causal, scale)[0]
    longest = WIDE // q.shape[2] if q.dtype == torch.float32 else sys.maxsize
    key = (q.shape[1], longest)
    if key not in packed.plans:
        packed.plans[key] = groups(packed.lengths[: len(packed.lengths) - packed.fillers], *key)
    out = torch.empty(q.shape, dtype=q.dtype)
    out[len(out) - packed.fillers :] = 0
    for group in packed.plans[key]:
        into = out[group.first : group.first + group.tokens]
        queries, keys, values = _block(q, group), _block(k, group), _block(v, group)
        if group.found is None:
            block = into.view(group.count, group.length, *q.shape[1:])
        else:
            block = torch.empty(group.count, group.length, *q.shape[1:], dtype=q.dtype)
        dense = group.tokens >= LEAST_TOKENS and group.length <= longest
        if not (dense and _attend(queries, keys, values, group.real, causal, scale, block)):
            attended = _attend_exactly(queries, keys, values, group.real, causal, scale)
            block = block.copy_(attended) if group.found is None else attended
        if group.found is not None:
            torch.index_select(block.flatten(0, 1), 0, group.found, out=into)
    return out


def _block(x: Tensor, group: Group) -> Tensor:
    """x [T,G,D] -> the group's [count,G,length,D]."""
    places = group.places
    rows = x[group.first : group.first + group.tokens] if places is None else x.index_select(0, places)
    return rows.view(group.count, group.length, *x.shape[1:]).transpose(1, 2)


def _attend_exactly(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, causal: bool, scale: float) -> Tensor:
    """torch's own, of q [N,H,n,D], k and v [N,G,m,D]: [N,n,H,D]."""
    mask = None if causal else real
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, causal: bool, scale: float, out: Tensor) -> bool:
    """q [N,H,n,D], k and v [N,G,n,D] -> out [N,n,H,D]; False: scores out of range."""
    count, heads, length, size = q.shape
    pairs = count * k.shape[1]
    # Contiguous, as oneDNN takes them: it would copy those of one sequence alone for every product.
    keys = (k - k.mean(dim=2, keepdim=True)).reshape(pairs, length, size).contiguous()
    values = v.reshape(pairs, length, size).contiguous()
    buffer = torch.empty(count * heads * min(length, QUERIES) * length, dtype=q.dtype)
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        seen = end if causal else length
        # Query heads that read one key head are more rows of one product.
        queries = q[:, :, start:end].reshape(pairs, -1, size)
        scores = buffer[: queries.shape[0] * queries.shape[1] * seen].view(*queries.shape[:2], seen)
        torch.baddbmm(scores, queries, keys[:, :seen].mT, beta=0, alpha=scale / math.log(2), out=scores).exp2_()
        weights = scores.view(count, heads, end - start, seen)
        if causal:
            weights.tril_(start)
        elif real is not None:
            weights.mul_(real)
        sums = weights.sum(-1, keepdim=True)
        least, largest = torch.aminmax(sums)
        if not (1 / LARGEST_SUM[causal] < least and largest < LARGEST_SUM[causal]):
            return False
        found = torch.bmm(scores, values[:, :seen]).view(count, heads, end - start, size)
        torch.div(found.transpose(1, 2), sums.transpose(1, 2), out=out[:, start:end])
    return True
