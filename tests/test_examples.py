"""The examples, run against the real stack; tests/clients runs the LangChain example."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from conftest import MINILM, ROOT, Stack

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    server = Stack(tmp_path_factory.mktemp("stack") / "log", "--dtype=float32")
    yield server
    server.stop()


def run(stack: Stack, *command: str | Path) -> str:
    environment = {**os.environ, "EMBED_URL": stack.url, "TRITON_GRPC": stack.grpc}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    return SentenceTransformer(str(MINILM), device="cpu")


def test_curl_prints_vectors_and_ranks_the_right_document_first(stack: Stack) -> None:
    output = run(stack, "bash", EXAMPLES / "curl.sh")
    assert output.count('"object":"embedding"') == 3
    assert "[101,2320,2588,1037,2051,102]" in output.replace(" ", "")
    assert output.index('"index":1') < output.index('"index":0', output.index('"results"'))


def test_openai_client_prints_cosines_of_sentence_transformers(stack: Stack, reference: SentenceTransformer) -> None:
    *lines, usage = run(stack, sys.executable, EXAMPLES / "openai_client.py").splitlines()
    texts = [line.partition("  ")[2] for line in lines]
    vectors = reference.encode(texts, normalize_embeddings=True)
    assert [float(line.split()[0]) for line in lines] == pytest.approx((vectors @ vectors[0]).tolist(), abs=6e-4)
    assert usage.endswith("tokens")


def test_triton_client_prints_shapes_and_tokens(stack: Stack) -> None:
    assert run(stack, sys.executable, EXAMPLES / "triton_client.py").startswith("vectors (2, 384), tokens [6, 4],")


def test_bulk_writes_the_vectors_of_sentence_transformers(
    stack: Stack, reference: SentenceTransformer, tmp_path: Path
) -> None:
    texts = [f"text number {i}" for i in range(300)]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n\n")
    run(stack, sys.executable, EXAMPLES / "bulk.py", tmp_path / "texts.txt", tmp_path / "vectors.npy")
    vectors = np.load(tmp_path / "vectors.npy")
    assert np.abs(vectors - reference.encode(texts, normalize_embeddings=True)).max() < 1e-5


def test_every_example_is_run() -> None:
    run_here = {"curl.sh", "openai_client.py", "triton_client.py", "bulk.py"}
    run_by_conformance = {"langchain_search.py"}
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix != ".md"} == run_here | run_by_conformance
