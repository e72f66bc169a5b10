"""Block size tables: every file is complete, every size has a config, and unknown devices are rejected."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from triton_embed.kernels.gpu import blocks
from triton_embed.kernels.gpu.blocks import Config, Table

FILES = sorted(blocks.DIRECTORY.glob("*.json"))
SIZES = {  # kernel -> lookup keys
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
def cleared_cache() -> Iterator[None]:
    blocks.table_for.cache_clear()
    yield
    blocks.table_for.cache_clear()


def fake_device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str = "") -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)


def test_every_architecture_has_a_table() -> None:
    assert {path.stem for path in FILES} == set(blocks.ARCHITECTURES.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_contains_exactly_the_keys_that_are_read(path: Path) -> None:
    kernels = json.loads(path.read_text())
    assert kernels.keys() == SIZES.keys()
    for kernel, entries in kernels.items():
        for entry in entries:
            assert entry.keys() <= {"up_to", "config"}
            assert entry.get("up_to", {}).keys() <= SIZES[kernel]
            assert entry.get("config", {}).keys() <= asdict(Config()).keys()
        configs = [Config(**entry["config"]) for entry in entries if "config" in entry]
        for config in configs:
            sizes = {config.block_m, config.block_n, config.block_k, config.num_warps}
            assert all(size & (size - 1) == 0 and size > 0 for size in sizes)
            assert config.num_warps <= 32
            assert 1 <= config.num_stages <= 8


@pytest.mark.parametrize("architecture", sorted(set(blocks.ARCHITECTURES.values())))
def test_every_supported_size_has_a_config(architecture: str) -> None:
    table = blocks.load_table(architecture)
    for itemsize in (2, 4):
        for kernel in ("attention", "pooled_attention"):
            for head_dim in range(16, 257, 16):
                config = table.config(kernel, itemsize=itemsize, head_dim=head_dim)
                assert config.block_m >= 16  # the minimum of tl.dot
                assert config.block_n >= 16
        for tokens in (1, 32, 33, 128, 129, 100_000):
            config = table.config("linear", tokens=tokens, outputs=14_336, inputs=4_096, itemsize=itemsize)
            assert min(config.block_m, config.block_n, config.block_k) >= 16
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
def test_first_entry_within_all_limits_applies(tokens: int, itemsize: int, expected: Config | None) -> None:
    table = Table("sm00", ENTRIES)
    for _ in range(2):  # looked up, then cached
        assert table.find_config("linear", tokens=tokens, itemsize=itemsize) == expected
        assert table.find_config("linear", itemsize=itemsize, tokens=tokens) == expected


def test_limits_are_unique_and_sorted() -> None:
    table = Table("sm00", {"linear": [{"up_to": {"tokens": 128}}, *ENTRIES["linear"]]})
    assert table.limits("linear", "tokens") == [32, 128]
    assert table.limits("linear", "inputs") == []
    assert table.limits("attention", "tokens") == []


@pytest.mark.parametrize("kernel", ["linear", "attention"])
def test_missing_entry_raises_lookup_error(kernel: str) -> None:
    table = Table("sm00", ENTRIES)
    assert table.find_config(kernel, itemsize=4, tokens=7) is None
    with pytest.raises(LookupError) as error:
        table.config(kernel, itemsize=4, tokens=7)
    assert str(error.value) == (
        f"The block size table of sm00 has no entry for '{kernel}' at {{'itemsize': 4, 'tokens': 7}}"
    )


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm100"), ((12, 0), "sm80")],
    ids=str,
)
def test_device_uses_the_table_of_its_architecture(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architecture: str
) -> None:
    fake_device(monkeypatch, capability)
    assert blocks.table_for(H100) is blocks.load_table(architecture)
    assert blocks.table_for(H100).architecture == architecture


def test_device_is_queried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch, (9, 0))
    blocks.table_for(H100)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: pytest.fail("queried again"))
    assert blocks.table_for(torch.device("cuda", 3)).architecture == "sm90"


def test_cpu_uses_the_table_with_the_smallest_blocks() -> None:
    assert blocks.table_for(torch.device("cpu")) is blocks.load_table("sm80")


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "Tesla T4"), ((11, 0), "Future GPU")], ids=str)
def test_unknown_device_raises_lookup_error(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    fake_device(monkeypatch, capability, name)
    with pytest.raises(LookupError) as error:
        blocks.table_for(H100)
    number = ".".join(map(str, capability))
    assert str(error.value) == f"The Triton kernels do not support {name} (compute capability {number})"


def test_amd_device_with_a_known_capability_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch, (9, 4), "AMD Instinct MI300X")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(LookupError, match="do not support AMD Instinct MI300X"):
        blocks.table_for(H100)
