"""Expected vectors of the tiny checkpoints, computed by the oracle that `triton-embed verify` uses.

The functions of that oracle are exported here as well, so that tests import one module.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import EXTRA_TOKEN, Case
from transformers import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from triton_embed.gateway.locations import FAMILIES
from triton_embed.gateway.verify.oracle import (
    clip_image_vectors,
    clip_text_vectors,
    gme_inputs,
    gme_text,
    gme_vectors,
    hidden_states,
    model_type,
    pooled_vectors,
    token_ids,
)
from triton_embed.python_backend.checkpoint import repository

__all__ = [
    "INSTRUCTION_PROMPTS",
    "Answer",
    "clip_image_tokens",
    "clip_image_vectors",
    "clip_text_vectors",
    "decoder_vectors",
    "expected_answer",
    "gme_inputs",
    "gme_text",
    "gme_vectors",
    "hidden_states",
    "model_type",
    "parameters_of",
    "pooled_vectors",
    "token_ids",
    "vectors_of",
]

Item = Mapping[str, Any]  # `text`, `images` and `instruction`, each optional

# Of the official code. Families without an entry take no instruction, except GME, whose template contains it.
INSTRUCTION_PROMPTS = {
    "bge": "{instruction}{text}",
    "e5_mistral": "Instruct: {instruction}\nQuery: {text}",
    "gte_qwen2": "Instruct: {instruction}\nQuery: {text}",
    "qwen3_embedding": "Instruct: {instruction}\nQuery:{text}",
}
POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "last": "pooling_mode_lasttoken",
}


@dataclass
class Answer:
    """The answer to one request: a row per item."""

    vectors: np.ndarray  # [n, d], of unit length
    tokens: list[int | None]  # None: any number is correct
    dropped: list[int]  # tokens removed by truncation


@cache
def parameters_of(family: str) -> Mapping[str, str]:
    """Return the parameters in the config.pbtxt of a family."""
    declared = repository.read_config(FAMILIES, family).parameters
    return {key: declared[key].string_value for key in declared}


def expected_answer(case: Case, directory: Path, items: Sequence[Item], prompt: str = "{text}") -> Answer:
    """Return the answer that transformers gives to every item alone. `prompt` is put around each text."""
    if model_type(directory) == "qwen2_vl":
        low, high = (int(case.parameters[f"{end}_image_tokens"]) for end in ("min", "max"))
        inputs = list(gme_inputs(directory, items, low, high))
        lengths = [item["input_ids"].shape[1] for item in inputs]
        assert max(lengths) <= case.limit
        return Answer(gme_vectors(directory, inputs, case.parameters["image_positions"]), lengths, [0] * len(items))
    texts = [prompt.replace("{text}", item["text"]) for item in items if "text" in item]
    full, rows = token_ids(directory, texts), token_ids(directory, texts, case.limit)
    dropped = [len(uncut) - len(ids) for uncut, ids in zip(full, rows, strict=True)]
    if model_type(directory) != "clip":
        return Answer(vectors_of(directory, rows), [len(ids) for ids in rows], dropped)
    # CLIP may pool the extra token. Then the server need not compute the tokens after it.
    tokens = [None if EXTRA_TOKEN in text else len(ids) for text, ids in zip(texts, rows, strict=True)]
    by_text = Answer(vectors_of(directory, rows), tokens, dropped)
    images = [item["images"][0] for item in items if "images" in item]
    patches: list[int | None] = [clip_image_tokens(directory)] * len(images)
    by_image = Answer(clip_image_vectors(directory, images), patches, [0] * len(images))
    return _interleave(by_text, by_image, ["images" in item for item in items])


def vectors_of(directory: Path, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the vectors that transformers computes for token ids, pooled as 1_Pooling declares."""
    if model_type(directory) == "clip":
        return clip_text_vectors(directory, rows)
    if model_type(directory) == "qwen2_vl":
        return gme_vectors(directory, [{"input_ids": torch.tensor([ids])} for ids in rows])
    declared = json.loads((directory / "1_Pooling" / "config.json").read_text())
    (pooling,) = (mode for mode, key in POOLING_KEYS.items() if declared.get(key))
    return pooled_vectors(directory, rows, pooling)


def decoder_vectors(directory: Path, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the last-token vectors of token ids."""
    return pooled_vectors(directory, rows, "last")


def clip_image_tokens(directory: Path) -> int:
    """Return the number of tokens that the vision tower computes for an image: its patches and the class token."""
    return int(CLIPVisionEmbeddings(CLIPConfig.from_pretrained(directory).vision_config).num_positions)


def _interleave(first: Answer, second: Answer, from_second: Sequence[bool]) -> Answer:
    """Merge two answers. Row i comes from the second if `from_second[i]`."""
    order = np.argsort(np.argsort(np.array(from_second), kind="stable"), kind="stable")
    tokens, dropped = [*first.tokens, *second.tokens], [*first.dropped, *second.dropped]
    vectors = np.concatenate([first.vectors, second.vectors])[order]
    return Answer(vectors, [tokens[i] for i in order], [dropped[i] for i in order])
