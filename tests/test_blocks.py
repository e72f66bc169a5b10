"""The tables of block sizes: every file is whole, every size is served, an unknown device is refused in a sentence."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from triton_embed.kernels import blocks
from triton_embed.kernels.blocks import Config, Table

FILES = sorted(blocks.DIRECTORY.glob("*.json"))
SIZES = {  # kernel -> what it is looked up by
    "attention": {"itemsize", "head_dim"},
    "pooled_attention": {"itemsize", "head_dim"},
    "linear": {"tokens", "outputs", "inputs", "itemsize"},
    "rowwise": {"width"},
    "elementwise": {"width"},
    "rotary": {"half"},
    "pooling": {"width"},
    "patchify": {"values"},
}
H100 = torch.device("cuda", 3)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    blocks.of.cache_clear()
    yield
    blocks.of.cache_clear()


def device_is(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str = "") -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)


def test_there_is_a_table_for_every_architecture() -> None:
    assert {path.stem for path in FILES} == set(blocks.ARCHITECTURES.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_no_more_and_no_less_than_is_read(path: Path) -> None:
    kernels = json.loads(path.read_text())
    assert kernels.keys() == SIZES.keys()
    for kernel, entries in kernels.items():
        for entry in entries:
            assert entry.keys() <= {"up_to", "config"}
            assert entry.get("up_to", {}).keys() <= SIZES[kernel]
            assert entry.get("config", {}).keys() <= asdict(Config()).keys()
        configs = [Config(**entry["config"]) for entry in entries if "config" in entry]
        for config in configs:
            blocks = {config.block_m, config.block_n, config.block_k, config.num_warps}
            assert all(block & (block - 1) == 0 and block > 0 for block in blocks)
            assert config.num_warps <= 32
            assert 1 <= config.num_stages <= 8


@pytest.mark.parametrize("architecture", sorted(set(blocks.ARCHITECTURES.values())))
def test_every_size_that_a_kernel_takes_is_served(architecture: str) -> None:
    table = blocks.table(architecture)
    for itemsize in (2, 4):
        for kernel in ("attention", "pooled_attention"):
            for head_dim in range(16, 257, 16):
                found = table.config(kernel, itemsize=itemsize, head_dim=head_dim)
                assert found.block_m >= 16  # as tl.dot needs
                assert found.block_n >= 16
        for tokens in (1, 32, 33, 128, 129, 100_000):
            found = table.config("linear", tokens=tokens, outputs=14_336, inputs=4_096, itemsize=itemsize)
            assert min(found.block_m, found.block_n, found.block_k) >= 16
    for width in (1, 60, 384, 1_024, 1_280, 4_096, 12_288, 37_888):
        for kernel in ("rowwise", "elementwise", "pooling"):
            table.config(kernel, width=width)
    for half in range(8, 129, 8):
        table.config("rotary", half=half)
    for patch in (14, 16, 32):
        table.config("patchify", values=3 * patch * patch)


ENTRIES = {
    "linear": [
        {"up_to": {"itemsize": 2, "tokens": 32}, "config": {"block_m": 16}},
        {"up_to": {"itemsize": 2, "tokens": 128}},
        {"up_to": {"itemsize": 2}, "config": {"block_m": 128, "num_warps": 8}},
    ]
}


@pytest.mark.parametrize(
    ("tokens", "itemsize", "expected"),
    [
        (1, 2, Config(block_m=16)),
        (32, 2, Config(block_m=16)),
        (33, 2, None),
        (128, 2, None),
        (129, 2, Config(block_m=128, num_warps=8)),
        (1, 4, None),
    ],
)
def test_the_first_entry_whose_limits_all_hold_counts(tokens: int, itemsize: int, expected: Config | None) -> None:
    table = Table("sm00", ENTRIES)
    for _ in range(2):  # looked up, then remembered
        assert table.choice("linear", tokens=tokens, itemsize=itemsize) == expected
        assert table.choice("linear", itemsize=itemsize, tokens=tokens) == expected


def test_the_limits_of_a_size_are_told_once_each_in_order() -> None:
    table = Table("sm00", {"linear": [{"up_to": {"tokens": 128}}, *ENTRIES["linear"]]})
    assert table.limits("linear", "tokens") == [32, 128]
    assert table.limits("linear", "inputs") == []
    assert table.limits("attention", "tokens") == []


@pytest.mark.parametrize("kernel", ["linear", "attention"])
def test_what_a_table_has_nothing_for_is_refused_in_a_sentence(kernel: str) -> None:
    table = Table("sm00", ENTRIES)
    assert table.choice(kernel, itemsize=4, tokens=7) is None
    with pytest.raises(LookupError) as refused:
        table.config(kernel, itemsize=4, tokens=7)
    assert str(refused.value) == f"the table of sm00 has no '{kernel}' for {{'itemsize': 4, 'tokens': 7}}"


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm100"), ((12, 0), "sm80")],
    ids=str,
)
def test_a_device_has_the_table_of_its_architecture(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architecture: str
) -> None:
    device_is(monkeypatch, capability)
    assert blocks.of(H100) is blocks.table(architecture)
    assert blocks.of(H100).architecture == architecture


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device_is(monkeypatch, (9, 0))
    blocks.of(H100)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: pytest.fail("asked again"))
    assert blocks.of(torch.device("cuda", 3)).architecture == "sm90"


def test_a_cpu_has_the_table_of_the_smallest_blocks() -> None:
    assert blocks.of(torch.device("cpu")) is blocks.table("sm80")


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "Tesla T4"), ((11, 0), "a device of tomorrow")], ids=str)
def test_an_unknown_device_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    device_is(monkeypatch, capability, name)
    with pytest.raises(LookupError) as refused:
        blocks.of(H100)
    number = ".".join(map(str, capability))
    assert str(refused.value) == f"the kernels were never tried on {name} (compute capability {number})"


def test_a_device_of_another_maker_is_refused_though_its_number_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    device_is(monkeypatch, (9, 4), "AMD Instinct MI300X")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(LookupError, match="never tried on AMD Instinct MI300X"):
        blocks.of(H100)
