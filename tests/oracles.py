"""What transformers computes for a checkpoint: float32, one row at a time, no padding, each vector L2-normalised."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

GME_INSTRUCTION = "You are a helpful assistant."
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


def ids_of(directory: Path, texts: Sequence[str], end: str = "", limit: int | None = None) -> list[list[int]]:
    """AutoTokenizer's ids, special tokens included, cut to `limit` tokens as transformers cuts.

    `end`: the token that the model's official code puts behind a text although its tokenizer does not: </s> for
    e5-mistral and <|endoftext|> for gte-Qwen2. The other families need none.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tail = [tokenizer.convert_tokens_to_ids(end)] if end else []
    cut = {} if limit is None else {"truncation": True, "max_length": limit - len(tail)}
    rows = [tokenizer(text, **cut)["input_ids"] for text in texts]
    assert not end or all(row[-1] != tail[0] for row in rows)
    return [row + tail for row in rows]


def decoder_states(directory: Path, rows: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The last hidden state of every token, a row at a time."""
    network = _network(AutoModel, directory, dtype)
    found = []
    with torch.inference_mode():
        for row in rows:
            # dynamic RoPE remembers the longest row it has seen, until a short one comes by
            network(torch.tensor([[0]]))
            found.append(network(torch.tensor([row])).last_hidden_state[0])
    return found


def decoder_vectors(directory: Path, rows: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Last-token vectors of a Mistral, Llama, Qwen2 (causal as its config says) or Qwen3."""
    return _normalised([state[-1] for state in decoder_states(directory, rows, dtype)])


def encoder_vectors(directory: Path, rows: Sequence[Sequence[int]], pooling: str) -> np.ndarray:
    """Vectors of a BERT or XLM-RoBERTa, `pooling` being cls or mean."""
    network = _network(AutoModel, directory, add_pooling_layer=False)
    with torch.inference_mode():
        states = [network(torch.tensor([row])).last_hidden_state[0] for row in rows]
    return _normalised([state[0] if pooling == "cls" else state.mean(0) for state in states])


def clip_text_vectors(directory: Path, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Projected text vectors; which token is pooled is transformers' rule for this config's eos_token_id."""
    network = _network(CLIPModel, directory)
    with torch.inference_mode():
        return _normalised([network.get_text_features(torch.tensor([row])).pooler_output[0] for row in rows])


def clip_image_vectors(directory: Path, images: Sequence[Image.Image]) -> np.ndarray:
    """Projected image vectors, after the checkpoint's own preprocessor."""
    network = _network(CLIPModel, directory)
    processor = CLIPImageProcessorPil.from_pretrained(directory)
    with torch.inference_mode():
        pixels = [processor(image, return_tensors="pt")["pixel_values"] for image in images]
        return _normalised([network.get_image_features(one).pooler_output[0] for one in pixels])


def clip_image_tokens(directory: Path) -> int:
    """Tokens of the vision tower for a picture."""
    return int(_network(CLIPModel, directory).vision_model.embeddings.num_positions)


def gme_text(item: Mapping[str, Any]) -> str:
    """GME's template around an item of `text`, `images` and `instruction`, each optional."""
    user = VISION * len(item.get("images") or []) + (item.get("text") or "")
    system = item.get("instruction") or GME_INSTRUCTION
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )


def gme_inputs(
    directory: Path, items: Sequence[Mapping[str, Any]], min_tokens: int, max_tokens: int
) -> Iterator[dict[str, Tensor]]:
    """What Qwen2VLModel takes for each item. An image is between `min_tokens` and `max_tokens` of 28 x 28 pixels.

    Put together as Qwen2VLProcessor does, which itself cannot be loaded without torchvision.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    processor = Qwen2VLImageProcessorPil.from_pretrained(
        directory, min_pixels=min_tokens * 28 * 28, max_pixels=max_tokens * 28 * 28
    )
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for item in items:
        text = gme_text(item)
        inputs = dict(processor(item["images"], return_tensors="pt")) if item.get("images") else {}
        for grid in inputs.get("image_grid_thw", ()):
            count = int(grid.prod()) // processor.merge_size**2
            text = text.replace("<|image_pad|>", "<|held|>" * count, 1)
        inputs["input_ids"] = torch.tensor([tokenizer(text.replace("<|held|>", "<|image_pad|>"))["input_ids"]])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token).int()
        yield inputs


def gme_vectors(directory: Path, rows: Iterable[dict[str, Tensor]], positions: str = "mrope") -> np.ndarray:
    """Last-token vectors of a Qwen2-VL for what `gme_inputs` made.

    `positions`: mrope, or sequential, which is one count on all three axes.
    """
    network = _network(Qwen2VLForConditionalGeneration, directory).model
    found = []
    with torch.inference_mode():
        for inputs in rows:
            if positions == "sequential":
                length = inputs["input_ids"].shape[1]
                inputs["position_ids"] = torch.arange(length).expand(3, 1, length)
            found.append(network(**inputs).last_hidden_state[0, -1])
    return _normalised(found)


def _network(network_class: Any, directory: Path, dtype: torch.dtype = torch.float32, **options: object) -> Any:
    """Loaded for good: transformers itself gives a tensor that a file lacks random values, and only says so."""
    network, report = network_class.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    return network.eval()


def _normalised(pooled: Sequence[Tensor]) -> np.ndarray:
    vectors = torch.stack(list(pooled)).double()
    found: np.ndarray = (vectors / vectors.norm(dim=1, keepdim=True)).numpy()
    return found
