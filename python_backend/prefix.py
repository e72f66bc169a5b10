"""Prefix: what many rows begin with, computed once.

A causal decoder's keys and values of a token depend on nothing behind it, so an instruction's are the same in every
row that begins with it. Rows that do are computed from there on, and attend to the keys and values kept.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.batch import one_each
from triton_embed.python_backend.row import Ids, Row

KeysValues = tuple[Tensor, Tensor]  # of one layer, each [P,G,D]
# Tokens: of one prefix, and of all that are kept. Callers choose what an instruction is, and the keys and values of a
# token are 224 KiB in the 0.6B model in fp32, 128 KiB in the 7B one in bf16.
LONGEST = 256
KEPT = 1_024
SEEN = 1_024  # prefixes
# Two forward passes cost more than one: rows of one prefix are split off only where that saves so much of a batch.
LEAST_SHARE = 0.25


@dataclass(frozen=True)
class Prefix:
    """P ids, and their keys and values in each layer."""

    ids: Ids
    layers: tuple[KeysValues, ...]


class SharingNetwork(Protocol):
    """A network that gives one state a row, and can begin behind a prefix."""

    def __call__(self, rows: Sequence[Row], prefix: Prefix | None = None) -> tuple[Tensor, Packed]: ...
    def read_prefix(self, ids: Ids) -> Prefix: ...


class PrefixReuse:
    """A network's forward, with the prefix that saves a batch the most tokens taken from memory.

    A prefix is computed when it is met for the second time: one that never comes back would cost more than it saves.
    """

    def __init__(self, network: SharingNetwork) -> None:
        self._network = network
        self._known: OrderedDict[bytes, Prefix] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def __call__(self, rows: Sequence[Row]) -> tuple[Tensor, Packed]:
        sharing: dict[bytes, list[int]] = {}
        for i, row in enumerate(rows):
            if 0 < row.shared < len(row.ids):
                sharing.setdefault(row.ids[: min(row.shared, LONGEST)].tobytes(), []).append(i)
        # Met again, in an earlier batch or in this one.
        met = {key: members for key, members in sharing.items() if self._met(key) or len(members) > 1}
        if not met:
            return self._network(rows)
        saved = {key: len(members) * min(rows[members[0]].shared, LONGEST) for key, members in met.items()}
        key = max(saved, key=lambda key: saved[key])
        if saved[key] < LEAST_SHARE * sum(len(row.ids) for row in rows):
            return self._network(rows)
        members = met[key]
        prefix = self._read(key, rows[members[0]].ids)
        hidden, packed = self._network([rows[i] for i in members], prefix)
        if len(members) == len(rows):
            return hidden, packed
        others = sorted(set(range(len(rows))) - set(members))
        rest, _ = self._network([rows[i] for i in others])
        whole = hidden.new_empty(len(rows), hidden.shape[1])
        whole[members], whole[others] = hidden[: len(members)], rest[: len(others)]
        return whole, one_each(len(rows), whole.device)

    def _met(self, key: bytes) -> bool:
        """Whether it was met before; from now on it was."""
        met = key in self._known or key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        return met

    def _read(self, key: bytes, ids: Ids) -> Prefix:
        """The prefix of these ids whose bytes are `key`; those used longest ago are forgotten for it."""
        if key not in self._known:
            self._known[key] = self._network.read_prefix(ids[: len(key) // ids.itemsize])
        self._known.move_to_end(key)
        while sum(len(prefix.ids) for prefix in self._known.values()) > KEPT:
            self._known.popitem(last=False)
        return self._known[key]
