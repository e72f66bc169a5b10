"""Prefix cache: the keys and values of a prefix that many rows share are computed once.

In a causal decoder, the keys and values of a token do not depend on later tokens. Those of an instruction are therefore
the same in every row that begins with it, and such a row is computed from the end of the instruction on.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.inputs.row import Ids, Row
from triton_embed.python_backend.networks.batch import one_each

KeysValues = tuple[Tensor, Tensor]  # of one layer, each [P,G,D]
# Limits in tokens of one prefix and of all cached ones, because callers choose the instructions. The keys and values of
# a token take 224 KiB in the 0.6B model in fp32, and 128 KiB in the 7B model in bf16.
MAX_PREFIX_TOKENS = 256
MAX_CACHED_TOKENS = 1_024
MAX_SEEN = 1_024  # prefixes that are remembered to detect their second occurrence
# The rows of one prefix are computed in a separate pass only if that saves this share of the tokens of a batch, because
# two passes cost more than one.
MIN_SAVED_SHARE = 0.25


@dataclass(frozen=True)
class Prefix:
    """The P ids of a prefix, and their keys and values in each layer."""

    ids: Ids
    layers: tuple[KeysValues, ...]


class SharingNetwork(Protocol):
    """A network that returns one state per row and can start after a prefix."""

    def __call__(self, rows: Sequence[Row], prefix: Prefix | None = None) -> tuple[Tensor, Packed]: ...
    def read_prefix(self, ids: Ids) -> Prefix: ...


class PrefixCache:
    """A network's forward pass that reuses one prefix per batch: the one that saves the most tokens.

    A prefix is computed when it occurs for the second time, because one that never recurs costs more than it saves.
    """

    def __init__(self, network: SharingNetwork) -> None:
        self._network = network
        self._cached: OrderedDict[bytes, Prefix] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def __call__(self, rows: Sequence[Row]) -> tuple[Tensor, Packed]:
        sharing: dict[bytes, list[int]] = {}
        for i, row in enumerate(rows):
            if 0 < row.shared_prefix_tokens < len(row.ids):
                sharing.setdefault(row.ids[: min(row.shared_prefix_tokens, MAX_PREFIX_TOKENS)].tobytes(), []).append(i)
        # Prefixes that occurred before, in an earlier batch or in this one.
        recurring = {key: members for key, members in sharing.items() if self._note_occurrence(key) or len(members) > 1}
        if not recurring:
            return self._network(rows)
        saved = {
            key: len(members) * min(rows[members[0]].shared_prefix_tokens, MAX_PREFIX_TOKENS)
            for key, members in recurring.items()
        }
        key = max(saved, key=lambda key: saved[key])
        if saved[key] < MIN_SAVED_SHARE * sum(len(row.ids) for row in rows):
            return self._network(rows)
        members = recurring[key]
        prefix = self._prefix(key, rows[members[0]].ids)
        hidden, packed = self._network([rows[i] for i in members], prefix)
        if len(members) == len(rows):
            return hidden, packed
        others = sorted(set(range(len(rows))) - set(members))
        rest, _ = self._network([rows[i] for i in others])
        states = hidden.new_empty(len(rows), hidden.shape[1])
        states[members], states[others] = hidden[: len(members)], rest[: len(others)]
        return states, one_each(len(rows), states.device)

    def _note_occurrence(self, key: bytes) -> bool:
        """Record that a prefix occurred. Return whether it occurred in an earlier batch."""
        occurred = key in self._cached or key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return occurred

    def _prefix(self, key: bytes, ids: Ids) -> Prefix:
        """Return the prefix of these ids with the bytes `key`. Evict the least recently used ones."""
        if key not in self._cached:
            self._cached[key] = self._network.read_prefix(ids[: len(key) // ids.itemsize])
        self._cached.move_to_end(key)
        while sum(len(prefix.ids) for prefix in self._cached.values()) > MAX_CACHED_TOKENS:
            self._cached.popitem(last=False)
        return self._cached[key]
