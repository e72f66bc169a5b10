"""Prefix cache: a shared prefix is computed once and vectors still match transformers.

Covers every causal family, both kinds of position, windows shorter and longer than the prefix, and batches that mix
rows with and without a prefix.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import CASES
from oracles import INSTRUCTION_PROMPTS, expected_answer, parameters_of
from test_ops import one_thread  # noqa: F401 - applies to every test here
from test_vectors import items_of, png
from torch import Tensor

from conftest import Family
from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.execution import prefix_cache as prefix_file
from triton_embed.python_backend.execution.prefix_cache import Prefix, PrefixCache
from triton_embed.python_backend.inputs.parameters import Item
from triton_embed.python_backend.inputs.row import Row

Tiny = Callable[[str], Family]
INSTRUCTION = "Given a question about a cat, find the passages that answer it: "
NOT_SHAREABLE = ("bidirectional", "dynamic")
SHAREABLE = [
    case.name
    for case in CASES
    if parameters_of(case.family).get("pooling") == "last" and not any(word in case.name for word in NOT_SHAREABLE)
]


class RecordingNetwork:
    """A network that records each pass: the number of rows, and of their tokens outside the prefix."""

    def __init__(self, family: Family) -> None:
        self.network = family.embedder._network
        self.passes: list[tuple[int, int]] = []
        self.prefixes: list[int] = []

    def __call__(self, rows: Sequence[Row], prefix: Prefix | None = None) -> tuple[Tensor, Packed]:
        cached = 0 if prefix is None else len(prefix.ids)
        self.passes.append((len(rows), sum(len(row.ids) - cached for row in rows)))
        return self.network(rows, prefix)

    def read_prefix(self, ids: np.ndarray) -> Prefix:
        self.prefixes.append(len(ids))
        prefix: Prefix = self.network.read_prefix(ids)
        return prefix


def rows_of(family: Family, count: int, **parameters: str) -> list[Row]:
    items = [
        Item(item.get("text", ""), tuple(png(image) for image in item.get("images", ())))
        for item in items_of(family.serving.name)[:count]
    ]
    return family.rows(*items, **parameters)


def embed(family: Family, forward: object, rows: Sequence[Row]) -> np.ndarray:
    return family.embedder._embed(forward, family.embedder._head, rows, [family.model.dimensions] * len(rows))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SHAREABLE)
def test_vectors_with_a_cached_prefix_match_transformers(name: str, tiny: Tiny) -> None:
    family, (case,) = tiny(name), [case for case in CASES if case.name == name]
    count = 8
    items = items_of(case.family)[:count]
    if case.family == "gme_qwen2_vl":
        instructed = [{**item, "instruction": INSTRUCTION} for item in items]
        reference = expected_answer(case, family.directory, instructed)
    else:
        prompt = INSTRUCTION_PROMPTS[case.family].replace("{instruction}", INSTRUCTION)
        reference = expected_answer(case, family.directory, items, prompt)
    rows = rows_of(family, count, instruction=INSTRUCTION)
    network = RecordingNetwork(family)
    cache = PrefixCache(network)
    for _ in range(2):
        actual = embed(family, cache, rows)
        assert np.abs(actual - reference.vectors).max() < 1e-5
    (length,) = network.prefixes
    assert length >= 8
    tokens = sum(len(row.ids) for row in rows)
    assert network.passes == [(count, tokens - count * length)] * 2


@pytest.mark.parametrize("name", ["qwen3_embedding-bare", "gme_qwen2_vl-hub"])
def test_rows_with_and_without_a_prefix_share_a_batch(name: str, tiny: Tiny) -> None:
    family = tiny(name)
    plain = rows_of(family, 4) if "bare" in name else rows_of(family, 4, instruction="Other words.")
    shared = rows_of(family, 6, instruction=INSTRUCTION)
    rows = [plain[0], *shared[:2], plain[1], *shared[2:], *plain[2:]]
    network = RecordingNetwork(family)
    actual = embed(family, PrefixCache(network), rows)
    assert [count for count, _ in network.passes] == [6, 4]
    assert np.abs(actual - embed(family, family.embedder._network, rows)).max() < 1e-6


def test_prefix_of_a_single_row_is_computed_when_it_repeats(tiny: Tiny) -> None:
    family = tiny("qwen3_embedding-bare")
    (row,) = rows_of(family, 1, instruction=INSTRUCTION)
    network = RecordingNetwork(family)
    cache = PrefixCache(network)
    vectors = [embed(family, cache, [row]) for _ in range(3)]
    assert len(network.prefixes) == 1
    assert [tokens for _, tokens in network.passes] == [len(row.ids), *[len(row.ids) - row.shared_prefix_tokens] * 2]
    assert np.abs(np.stack(vectors) - vectors[0]).max() < 1e-6


def test_batch_is_not_split_for_a_small_gain(tiny: Tiny) -> None:
    family = tiny("qwen3_embedding-bare")
    many = [row for row in rows_of(family, 32) if len(row.ids) > 20]
    few = rows_of(family, 2, instruction=INSTRUCTION)
    network = RecordingNetwork(family)
    embed(family, PrefixCache(network), [*many, *few])
    assert not network.prefixes
    assert len(network.passes) == 1


def test_least_recently_used_prefix_is_evicted(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny("qwen3_embedding-bare")
    network = RecordingNetwork(family)
    cache = PrefixCache(network)
    lengths = {
        row.shared_prefix_tokens
        for row in rows_of(family, 1, instruction="The instruction that is called number three: ")
    }
    monkeypatch.setattr(prefix_file, "MAX_CACHED_TOKENS", 2 * max(lengths) + 4)  # room for two prefixes
    for word in ("one", "two", "one", "three", "one", "two"):
        embed(family, cache, rows_of(family, 3, instruction=f"The instruction that is called number {word}: "))
    assert len(network.prefixes) == 4  # one, two, three, and two again


def test_long_prefix_is_cached_up_to_the_limit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_file, "MAX_PREFIX_TOKENS", 5)
    family = tiny("qwen3_embedding-bare")
    rows = [
        replace(row, ids=row.ids[:16], shared_prefix_tokens=12) for row in rows_of(family, 4, instruction=INSTRUCTION)
    ]
    network = RecordingNetwork(family)
    actual = embed(family, PrefixCache(network), rows)
    assert (network.prefixes, network.passes) == ([5], [(4, 4 * 11)])
    assert np.abs(actual - embed(family, family.embedder._network, rows)).max() < 1e-6


@pytest.mark.parametrize("name", ["gte_qwen2-bidirectional", "e5_mistral-llama-dynamic", "bge-bert-cls", "clip-openai"])
def test_other_networks_do_not_share_prefixes(name: str, tiny: Tiny) -> None:
    """Check that nothing is shared if keys depend on later tokens or on the length of the row."""
    family = tiny(name)
    assert not family.embedder._network.shareable
    assert not isinstance(family.embedder._forward, PrefixCache)


def test_prefix_reuse_false_disables_the_cache(tiny: Tiny) -> None:
    family = tiny("qwen3_embedding-bare")
    assert isinstance(family.embedder._forward, PrefixCache)
    off = Family("qwen3_embedding", family.directory, prefix_reuse="false")
    assert not isinstance(off.embedder._forward, PrefixCache)


def test_row_records_the_tokens_of_its_instruction(tiny: Tiny) -> None:
    family = tiny("qwen3_embedding-bare")
    rows = rows_of(family, 8, instruction=INSTRUCTION)
    assert len({row.shared_prefix_tokens for row in rows}) == 1
    assert len({row.ids[: row.shared_prefix_tokens].tobytes() for row in rows}) == 1
    head = family.processor.tokenizer.count_tokens(f"Instruct: {INSTRUCTION}\nQuery:")
    assert head - 2 <= rows[0].shared_prefix_tokens <= head
    assert {row.shared_prefix_tokens for row in rows_of(family, 8)} == {0}
    assert {row.shared_prefix_tokens for row in rows_of(family, 2, instruction="a" * 5_000)} == {0}
