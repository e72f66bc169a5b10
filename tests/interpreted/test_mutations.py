"""Kernels broken on purpose: for each mutation, the test that must fail.

Each mutation is applied to a copy of the kernels, which a separate process imports instead of the original. The
process is forked from one that has imported everything else, which takes longer than most of the tests.
"""

import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["numpy", "pytest", "torch", "triton"])


@dataclass(frozen=True)
class Mutation:
    """A change of a kernel: `old`, which occurs once in `file`, becomes `new`, and `test` must fail."""

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
        "one block too many is computed without a mask",
        "attention.py",
        "    unmasked = tl.maximum((all_high - start) // BLOCK_N - unmasked_from, 0)",
        "    unmasked = tl.maximum(tl.cdiv(all_high - start, BLOCK_N) - unmasked_from, 0)",
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
        "tl.maximum(token - begin + prefix_tokens - WINDOW + 1, 0)",
        "tl.maximum(token - begin - WINDOW + 1, 0)",
        "test_attention.py::test_prefix_before_every_sequence[True-20-17]",
    ),
    Mutation(
        "a window reaches one key too far",
        "attention.py",
        "    low = tl.maximum(begin, token - WINDOW + 1) if",
        "    low = tl.maximum(begin, token - WINDOW) if",
        "test_attention.py::test_windows_around_the_edges_of_blocks[33]",
    ),
    Mutation(
        "blocks before the unmasked ones are not masked",
        "attention.py",
        "    unmasked_from = tl.minimum(tl.cdiv(all_low - start, BLOCK_N), block_count)",
        "    unmasked_from = tl.minimum((all_low - start) // BLOCK_N, block_count)",
        "test_attention.py::test_windows_around_the_edges_of_blocks[33]",
    ),
    Mutation(
        "the second part of a head is not rescaled",
        "attention.py",
        "v1, out1 * rescale[:, None],",
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
        "query heads are mapped to the wrong key heads",
        "attention.py",
        "    token, head = q_first + rows // GROUP, kv_head * GROUP + rows % GROUP",
        "    token, head = q_first + rows // GROUP, kv_head + rows % GROUP * KV_HEADS",
        "test_attention.py::test_groups_that_do_not_divide_a_block[3]",
    ),
    Mutation(
        "columns past the end of a head are written",
        "attention.py",
        ("mask=mask[:, None] & (columns < HEAD_DIM))\n\n\n@triton.jit\ndef _attend_block("),
        ("mask=mask[:, None])\n\n\n@triton.jit\ndef _attend_block("),
        "test_attention.py::test_every_head_size[112]",
    ),
    Mutation(
        "infinity times 0 reaches a neighbor",
        "attention.py",
        '    finite = tl.abs(v.to(tl.float32)) < float("inf")',
        "    finite = v == v",
        "test_attention.py::test_nonfinite_token_affects_only_queries_that_see_it[16-v-inf-causal]",
    ),
    Mutation(
        "a norm divides by its block size instead of its width",
        "norm.py",
        "tl.sum(x * x, axis=1) / WIDTH",
        "tl.sum(x * x, axis=1) / x.shape[1]",
        "test_norm.py::test_norm_of_a_sum",
    ),
    Mutation(
        "rows past the last are stored",
        "norm.py",
        "tl.store(y + out_offsets, normed.to(y.dtype.element_ty), mask=mask)",
        "tl.store(y + out_offsets, normed.to(y.dtype.element_ty), mask=(column < WIDTH)[None, :])",
        "test_norm.py::test_norm_of_a_sum",
    ),
    Mutation(
        "keys are normed with the weight of queries",
        "rotary.py",
        "head < QUERY_HEADS",
        "head < HEADS",
        "test_rotary.py::test_every_layout_of_heads",
    ),
    Mutation(
        "relu replaces NaN by 0",
        "functions.py",
        "tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)",
        "tl.where(x > 0.0, x, 0.0)",
        "test_activation.py::test_nan_stays_in_its_element",
    ),
    Mutation(
        "rows of the next sequence are pooled too",
        "pooling.py",
        "mask = (row < end)[:, None] & (column < WIDTH)[None, :]",
        "mask = (row < end + (end - start) % BLOCK_M)[:, None] & (column < WIDTH)[None, :]",
        "test_pooling.py::test_every_mode",
    ),
    Mutation(
        "patches are ordered row by row, ignoring merge",
        "patchify.py",
        (
            "block, index_in_block = patch // (MERGE * MERGE), patch % (MERGE * MERGE)\n"
            "    first_row = (block // columns * MERGE + index_in_block // MERGE) * PATCH\n"
            "    first_column = (block % columns * MERGE + index_in_block % MERGE) * PATCH"
        ),
        ("first_row = patch // (columns * MERGE) * PATCH\n    first_column = patch % (columns * MERGE) * PATCH"),
        "test_patchify.py::test_patches_match_unfold",
    ),
    Mutation(
        "the last group of programs has full height",
        "linear.py",
        "height = tl.minimum(tl.cdiv(count, BLOCK_M) - first_block, GROUP)",
        "height = GROUP",
        "test_linear.py::test_every_edge_of_a_block[129-32-17-config8-None-torch.float32]",
    ),
    Mutation(
        "a row past the end of a product is stored",
        "linear.py",
        "mask = (row < count)[:, None]",
        "mask = (row <= count)[:, None]",
        "test_linear.py::test_every_edge_of_a_block[15-17-33-config2-None-torch.float16]",
    ),
    Mutation(
        "one value past the end of a row is multiplied",
        "linear.py",
        "mask=(inner < K - start)[None, :]",
        "mask=(inner <= K - start)[None, :]",
        "test_linear.py::test_strided_rows[torch.float16]",
    ),
    Mutation(
        "32-bit offsets into x",
        "linear.py",
        "x_pointers = x + tl.minimum(row, count - 1).to(tl.int64)[:, None]",
        "x_pointers = x + tl.minimum(row, count - 1)[:, None]",
        "test_linear.py::test_row_strides_beyond_32_bits[x]",
    ),
    Mutation(
        "quick_gelu with sigmoid(1.7 x)",
        "functions.py",
        "tl.sigmoid(1.702 * x)",
        "tl.sigmoid(1.7 * x)",
        "test_linear.py::test_every_activation[quick_gelu-torch.float32]",
    ),
]


def run_pytest(directory: Path, *tests: str) -> tuple[int | None, list[str]]:
    """Run pytest with the kernels in `directory`; return its exit status and the failure messages."""
    process = PROCESSES.Process(target=_run_pytest, args=(directory, tests))
    process.start()
    process.join()
    assert (directory / "report.xml").exists(), (directory / "output").read_text()
    cases = ElementTree.parse(directory / "report.xml").iter()  # noqa: S314 - pytest wrote this file
    return process.exitcode, [case.get("message", "") for case in cases if case.tag in {"failure", "error"}]


def _run_pytest(directory: Path, tests: tuple[str, ...]) -> None:
    sys.path.insert(0, str(directory))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--junitxml={directory / 'report.xml'}"]
    options += ["-c", os.devnull, f"--rootdir={HERE}", f"--confcutdir={HERE}"]
    with (directory / "output").open("w") as output, redirect_stdout(output), redirect_stderr(output):
        status = pytest.main([*options, *(str(HERE / test) for test in tests)])
    sys.exit(status)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Create a directory whose `triton_embed.kernels` takes precedence over the installed one."""
    shutil.copytree(KERNELS, tmp_path / "triton_embed" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutated_kernel_fails_its_test(mutation: Mutation, copy: Path) -> None:
    file = copy / "triton_embed" / "kernels" / "gpu" / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1
    file.write_text(text.replace(mutation.old, mutation.new))
    status, failures = run_pytest(copy, mutation.test)
    assert status == 1
    assert len(failures) == 1
    assert "AssertionError" in failures[0] or "assert " in failures[0]


def test_unchanged_copy_passes(copy: Path) -> None:
    status, failures = run_pytest(copy, "test_patchify.py")
    assert failures == []
    assert status == 0
