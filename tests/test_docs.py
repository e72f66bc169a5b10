"""The documentation: its steps work, its links resolve, and the files it names exist."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc
from checkpoints import write_decoder
from transformers import AutoModel, AutoTokenizer

from benchmarks import document
from conftest import ROOT, Triton

DOCUMENTS = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = ["the cat sat on the mat", "hello world", "a photo of a dog"]


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.M | re.S)


def test_steps_to_add_a_family_give_the_vectors_of_transformers(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "model_repository", tmp_path / "model_repository", ignore=shutil.ignore_patterns("__pycache__")
    )
    checkpoint = write_decoder(tmp_path / "checkpoints" / "acme" / "toy-embedder", "llama", pooling="mean")
    copy, edit = blocks(ROOT / "docs" / "models.md", "bash")
    (model,) = blocks(ROOT / "docs" / "models.md", "python")
    subprocess.run(["bash", "-euc", copy], cwd=tmp_path, check=True)
    (tmp_path / "model_repository" / "toy" / "1" / "model.py").write_text(model)
    subprocess.run(["bash", "-euc", edit], cwd=tmp_path, check=True)
    for directory in (tmp_path / "model_repository").iterdir():
        if directory.name != "toy":
            shutil.rmtree(directory)

    server = Triton(tmp_path / "model_repository", tmp_path / "log")
    try:
        cells = np.array([[text] for text in TEXTS], dtype=np.object_)
        tensor = tritonclient.grpc.InferInput("TEXT", [len(TEXTS), 1], "BYTES").set_data_from_numpy(cells)
        client = tritonclient.grpc.InferenceServerClient(server.grpc)
        vectors = client.infer("toy", [tensor]).as_numpy("EMBEDDING")
        client.close()
    finally:
        server.stop()

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    network = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    end = tokenizer.convert_tokens_to_ids("</s>")
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            pooled = network(torch.tensor([[*ids, end]])).last_hidden_state[0].mean(0)
        assert np.abs(vector - (pooled / pooled.norm()).numpy()).max() < 2e-5


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve_to_files_and_headings(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            assert heading in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_source_files_exist(path: Path) -> None:
    named = re.findall(
        r"`((?:gateway|python_backend|kernels|tests|benchmarks|model_repository)/[\w/.]+)`", path.read_text()
    )
    toy = "model_repository/toy/"  # created by the steps of docs/models.md
    assert [name for name in named if not name.startswith(toy) and not (ROOT / name).exists()] == []


def test_architecture_lists_every_source_file() -> None:
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", (ROOT / "docs" / "architecture.md").read_text(), re.M))
    folders = ("gateway", "python_backend", "kernels")
    assert listed == {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")}


def test_benchmarks_page_matches_the_result_files() -> None:
    assert document.PAGE.read_text() == document.render(), "run: python -m benchmarks.document"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
