"""What rows begin with is computed once, and their vectors stay transformers': every causal family, both kinds of
position, windows shorter and longer than the prefix, rows with and without it in one batch."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import CASES
from test_ops import one_thread  # noqa: F401 - applies to every test here
from test_vectors import PROMPTS, expected, items_of, png
from torch import Tensor

from conftest import Family
from triton_embed.kernels.packed import Packed
from triton_embed.python_backend.execution import prefix_cache as prefix_file
from triton_embed.python_backend.execution.prefix_cache import Prefix, PrefixCache
from triton_embed.python_backend.inputs.parameters import Item
from triton_embed.python_backend.inputs.row import Row

Tiny = Callable[[str], Family]
INSTRUCTION = "Given a question about a cat, find the passages that answer it: "
ALONE = ("bidirectional", "dynamic")
SHARING = [
    case.name for case in CASES if case.family not in ("bge", "clip") and not any(word in case.name for word in ALONE)
]


class Watched:
    """A network that remembers what it was asked for: rows, and how many of their ids were left to compute."""

    def __init__(self, family: Family) -> None:
        self.network = family.embedder._network
        self.passes: list[tuple[int, int]] = []
        self.prefixes: list[int] = []

    def __call__(self, rows: Sequence[Row], prefix: Prefix | None = None) -> tuple[Tensor, Packed]:
        known = 0 if prefix is None else len(prefix.ids)
        self.passes.append((len(rows), sum(len(row.ids) - known for row in rows)))
        return self.network(rows, prefix)

    def read_prefix(self, ids: np.ndarray) -> Prefix:
        self.prefixes.append(len(ids))
        found: Prefix = self.network.read_prefix(ids)
        return found


def asked(family: Family, count: int, **parameters: str) -> list[Row]:
    items = [
        Item(item.get("text", ""), tuple(png(image) for image in item.get("images", ())))
        for item in items_of(family.serving.name)[:count]
    ]
    return family.rows(*items, **parameters)


def embed(family: Family, forward: object, rows: Sequence[Row]) -> np.ndarray:
    return family.embedder._embed(forward, rows, [family.model.dimensions] * len(rows))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SHARING)
def test_vectors_behind_a_prefix_are_transformers_own(name: str, tiny: Tiny) -> None:
    family, (case,) = tiny(name), [case for case in CASES if case.name == name]
    count = 8
    items = items_of(case.family)[:count]
    if case.family == "gme_qwen2_vl":
        wanted = expected(case, family.directory, [{**item, "instruction": INSTRUCTION} for item in items])
    else:
        wanted = expected(case, family.directory, items, PROMPTS[case.family].replace("{instruction}", INSTRUCTION))
    rows = asked(family, count, instruction=INSTRUCTION)
    watched = Watched(family)
    reuse = PrefixCache(watched)
    for _ in range(2):
        found = embed(family, reuse, rows)
        assert np.abs(found - wanted.vectors).max() < 1e-5
    (length,) = watched.prefixes
    assert length >= 8
    tokens = sum(len(row.ids) for row in rows)
    assert watched.passes == [(count, tokens - count * length)] * 2


@pytest.mark.parametrize("name", ["qwen3_embedding-bare", "gme_qwen2_vl-hub"])
def test_rows_with_and_without_it_in_one_batch(name: str, tiny: Tiny) -> None:
    family = tiny(name)
    plain = asked(family, 4) if "bare" in name else asked(family, 4, instruction="Other words.")
    shared = asked(family, 6, instruction=INSTRUCTION)
    rows = [plain[0], *shared[:2], plain[1], *shared[2:], *plain[2:]]
    watched = Watched(family)
    found = embed(family, PrefixCache(watched), rows)
    assert [count for count, _ in watched.passes] == [6, 4]
    assert np.abs(found - embed(family, family.embedder._network, rows)).max() < 1e-6


def test_a_single_row_waits_for_its_prefix_to_come_back(tiny: Tiny) -> None:
    family = tiny("qwen3_embedding-bare")
    (row,) = asked(family, 1, instruction=INSTRUCTION)
    watched = Watched(family)
    reuse = PrefixCache(watched)
    vectors = [embed(family, reuse, [row]) for _ in range(3)]
    assert len(watched.prefixes) == 1
    assert [tokens for _, tokens in watched.passes] == [len(row.ids), *[len(row.ids) - row.shared_prefix_tokens] * 2]
    assert np.abs(np.stack(vectors) - vectors[0]).max() < 1e-6


def test_a_batch_is_not_split_for_little(tiny: Tiny) -> None:
    family = tiny("qwen3_embedding-bare")
    many = [row for row in asked(family, 32) if len(row.ids) > 20]
    few = asked(family, 2, instruction=INSTRUCTION)
    watched = Watched(family)
    embed(family, PrefixCache(watched), [*many, *few])
    assert not watched.prefixes
    assert len(watched.passes) == 1


def test_prefixes_are_forgotten_in_the_order_they_were_last_used(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny("qwen3_embedding-bare")
    watched = Watched(family)
    reuse = PrefixCache(watched)
    lengths = {
        row.shared_prefix_tokens
        for row in asked(family, 1, instruction="The instruction that is called number three: ")
    }
    monkeypatch.setattr(prefix_file, "MAX_CACHED_TOKENS", 2 * max(lengths) + 4)  # two of them
    for word in ("one", "two", "one", "three", "one", "two"):
        embed(family, reuse, asked(family, 3, instruction=f"The instruction that is called number {word}: "))
    assert len(watched.prefixes) == 4  # one, two, three, and two again


def test_no_more_than_the_beginning_of_a_long_instruction_is_kept(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_file, "MAX_PREFIX_TOKENS", 5)
    family = tiny("qwen3_embedding-bare")
    rows = [
        replace(row, ids=row.ids[:16], shared_prefix_tokens=12) for row in asked(family, 4, instruction=INSTRUCTION)
    ]
    watched = Watched(family)
    found = embed(family, PrefixCache(watched), rows)
    assert (watched.prefixes, watched.passes) == ([5], [(4, 4 * 11)])
    assert np.abs(found - embed(family, family.embedder._network, rows)).max() < 1e-6


@pytest.mark.parametrize("name", ["gte_qwen2-bidirectional", "e5_mistral-llama-dynamic", "bge-bert-cls", "clip-openai"])
def test_no_other_network_shares(name: str, tiny: Tiny) -> None:
    """Keys that look ahead, or whose angles depend on the length of the whole row, are every row's own."""
    family = tiny(name)
    assert not family.embedder._network.shareable
    assert not isinstance(family.embedder._forward, PrefixCache)


def test_the_operator_switches_it_off(tiny: Tiny) -> None:
    family = tiny("qwen3_embedding-bare")
    assert isinstance(family.embedder._forward, PrefixCache)
    off = Family("qwen3_embedding", family.directory, prefix_reuse="false")
    assert not isinstance(off.embedder._forward, PrefixCache)


def test_a_row_knows_how_much_of_it_is_the_instructions(tiny: Tiny) -> None:
    family = tiny("qwen3_embedding-bare")
    rows = asked(family, 8, instruction=INSTRUCTION)
    assert len({row.shared_prefix_tokens for row in rows}) == 1
    assert len({row.ids[: row.shared_prefix_tokens].tobytes() for row in rows}) == 1
    head = family.processor.tokenizer.count_tokens(f"Instruct: {INSTRUCTION}\nQuery:")
    assert head - 2 <= rows[0].shared_prefix_tokens <= head
    assert {row.shared_prefix_tokens for row in asked(family, 8)} == {0}
    assert {row.shared_prefix_tokens for row in asked(family, 2, instruction="a" * 5_000)} == {0}
