"""Kernels broken on purpose: for each way to be wrong, the test that notices.

Every mutation is made in a copy of the kernels, which a process of its own imports in their place.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import triton

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
TRITON = Path(triton.__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """`old`, found once in `file`, becomes `new`, and `test` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = [
    Mutation(
        "a causal query does not see itself",
        "attention.py",
        "    high = token + 1 if CAUSAL else",
        "    high = token if CAUSAL else",
        "test_attention.py::test_windows_around_the_edges_of_blocks[33]",
    ),
    Mutation(
        "one block too many without a mask",
        "attention.py",
        "    whole = tl.maximum((all_high - start) // BLOCK_N - whole_from, 0)",
        "    whole = tl.maximum(tl.cdiv(all_high - start, BLOCK_N) - whole_from, 0)",
        "test_attention.py::test_lengths_around_the_edges_of_blocks[False-None-(33,)-(16, 16)]",
    ),
    Mutation(
        "the second part of a head is left out of the scores",
        "attention.py",
        '        scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")\n',
        "",
        "test_attention.py::test_every_head_size[80]",
    ),
    Mutation(
        "a window does not count the prefix",
        "attention.py",
        "tl.maximum(token - begin + shared - WINDOW + 1, 0)",
        "tl.maximum(token - begin - WINDOW + 1, 0)",
        "test_attention.py::test_a_prefix_before_every_sequence[True-20-17]",
    ),
    Mutation(
        "a window reaches one key too far",
        "attention.py",
        "    low = tl.maximum(begin, token - WINDOW + 1) if",
        "    low = tl.maximum(begin, token - WINDOW) if",
        "test_attention.py::test_windows_around_the_edges_of_blocks[33]",
    ),
    Mutation(
        "blocks before the whole ones are not masked",
        "attention.py",
        "    whole_from = tl.minimum(tl.cdiv(all_low - start, BLOCK_N), blocks)",
        "    whole_from = tl.minimum((all_low - start) // BLOCK_N, blocks)",
        "test_attention.py::test_windows_around_the_edges_of_blocks[33]",
    ),
    Mutation(
        "the second part of a head is not rescaled",
        "attention.py",
        "v1, out1 * fade[:, None],",
        "v1, out1,",
        "test_attention.py::test_every_head_size[80]",
    ),
    Mutation(
        "exp2 without log2(e)",
        "attention.py",
        "    return scale * math.log2(math.e)",
        "    return scale",
        "test_attention.py::test_every_head_size[64]",
    ),
    Mutation(
        "query heads are spread over key heads the wrong way",
        "attention.py",
        "    token, head = q_first + rows // GROUP, kv_head * GROUP + rows % GROUP",
        "    token, head = q_first + rows // GROUP, kv_head + rows % GROUP * KV_HEADS",
        "test_attention.py::test_groups_that_do_not_divide_a_block[3]",
    ),
    Mutation(
        "columns past the end of a head are written",
        "attention.py",
        ("mask=mask[:, None] & (columns < HEAD_DIM))\n\n\n@triton.jit\ndef _attend("),
        ("mask=mask[:, None])\n\n\n@triton.jit\ndef _attend("),
        "test_attention.py::test_every_head_size[112]",
    ),
    Mutation(
        "infinity times 0 reaches a neighbour",
        "attention.py",
        '    finite = tl.abs(v.to(tl.float32)) < float("inf")',
        "    finite = v == v",
        "test_attention.py::test_a_spoiled_token_reaches_only_those_who_see_it[16-v-inf-causal]",
    ),
    Mutation(
        "a norm divides by its block, not by its width",
        "norm.py",
        "tl.sum(x * x, axis=1) / WIDTH",
        "tl.sum(x * x, axis=1) / x.shape[1]",
        "test_norm.py::test_the_norm_of_a_sum",
    ),
    Mutation(
        "rows past the last are stored",
        "norm.py",
        "tl.store(y + out, normed.to(y.dtype.element_ty), mask=kept)",
        "tl.store(y + out, normed.to(y.dtype.element_ty), mask=(column < WIDTH)[None, :])",
        "test_norm.py::test_the_norm_of_a_sum",
    ),
    Mutation(
        "keys are normed with the weight of queries",
        "rotary.py",
        "head < QUERY_HEADS",
        "head < HEADS",
        "test_rotary.py::test_every_layout_of_heads",
    ),
    Mutation(
        "a relu that swallows what is not a number",
        "functions.py",
        "tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)",
        "tl.where(x > 0.0, x, 0.0)",
        "test_activation.py::test_not_a_number_stays_where_it_is",
    ),
    Mutation(
        "the last rows of the next sequence are pooled too",
        "pooling.py",
        "kept = (row < end)[:, None] & (column < WIDTH)[None, :]",
        "kept = (row < end + (end - start) % BLOCK_M)[:, None] & (column < WIDTH)[None, :]",
        "test_pooling.py::test_every_mode",
    ),
    Mutation(
        "patches row by row, whatever the merge",
        "patchify.py",
        (
            "block, inside = patch // (MERGE * MERGE), patch % (MERGE * MERGE)\n"
            "    top = (block // columns * MERGE + inside // MERGE) * PATCH\n"
            "    left = (block % columns * MERGE + inside % MERGE) * PATCH"
        ),
        ("top = patch // (columns * MERGE) * PATCH\n    left = patch % (columns * MERGE) * PATCH"),
        "test_patchify.py::test_patches",
    ),
    Mutation(
        "a group of programs as high as the others where the rows end",
        "linear.py",
        "height = tl.minimum(tl.cdiv(count, BLOCK_M) - first, GROUP)",
        "height = GROUP",
        "test_linear.py::test_every_edge_of_a_block[129-32-17-config8-None-torch.float32]",
    ),
    Mutation(
        "a row of a product past the last is stored",
        "linear.py",
        "kept = (row < count)[:, None]",
        "kept = (row <= count)[:, None]",
        "test_linear.py::test_every_edge_of_a_block[15-17-33-config2-None-torch.float16]",
    ),
    Mutation(
        "one value past the end of a row is multiplied",
        "linear.py",
        "mask=(inner < K - start)[None, :]",
        "mask=(inner <= K - start)[None, :]",
        "test_linear.py::test_rows_that_lie_apart[torch.float16]",
    ),
    Mutation(
        "32-bit offsets into x",
        "linear.py",
        "place = x + tl.minimum(row, count - 1).to(tl.int64)[:, None]",
        "place = x + tl.minimum(row, count - 1)[:, None]",
        "test_linear.py::test_rows_further_apart_than_32_bits_count[x]",
    ),
    Mutation(
        "quick_gelu with sigmoid(1.7 x)",
        "functions.py",
        "tl.sigmoid(1.702 * x)",
        "tl.sigmoid(1.7 * x)",
        "test_linear.py::test_every_activation[quick_gelu-torch.float32]",
    ),
]


def run(directory: Path, *tests: str) -> tuple[int, list[str]]:
    """pytest's exit status, and what went wrong, with the kernels in `directory` in place of ours."""
    environment = os.environ | {"PYTHONPATH": f"{directory}:{TRITON}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    report = directory / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={HERE}", f"--confcutdir={HERE}"]
    command += ["-x", "-p", "no:cacheprovider", f"--junitxml={report}", *(str(HERE / test) for test in tests)]
    process = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True)
    assert report.exists(), process.stdout + process.stderr
    cases = ElementTree.parse(report).iter()  # noqa: S314 - our own file
    return process.returncode, [case.get("message", "") for case in cases if case.tag in {"failure", "error"}]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A directory whose `triton_embed.kernels` comes before the installed one."""
    shutil.copytree(KERNELS, tmp_path / "triton_embed" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_broken_kernel_is_noticed(mutation: Mutation, copy: Path) -> None:
    file = copy / "triton_embed" / "kernels" / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1
    file.write_text(text.replace(mutation.old, mutation.new))
    status, faults = run(copy, mutation.test)
    assert status == 1
    assert len(faults) == 1
    assert "AssertionError" in faults[0] or "assert " in faults[0]


def test_a_copy_as_it_is_passes(copy: Path) -> None:
    status, faults = run(copy, "test_linear.py")
    assert faults == []
    assert status == 0
