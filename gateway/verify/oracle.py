"""Vectors of a checkpoint by transformers or sentence-transformers: on the CPU, in fp32, one row at a time, unpadded.

Only this module imports these libraries, and only when it runs: serving does not need them.
"""

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image

from triton_embed.python_backend.wire import ModelInfo

log = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float64]

# model_type of networks whose last hidden states are pooled -> the token that the official code appends to every text.
# None: the tokenizer's eos_token; empty: no token. https://huggingface.co/intfloat/e5-mistral-7b-instruct,
# https://huggingface.co/Alibaba-NLP/gte-Qwen2-1.5B-instruct/blob/main/tokenization_qwen.py, Qwen3's tokenizer.json
_ENDS = {
    "bert": "",
    "xlm-roberta": "",
    "mistral": None,
    "llama": None,
    "qwen2": "<|endoftext|>",
    "qwen3": "<|endoftext|>",
}
_ENCODERS = ("bert", "xlm-roberta")
# gme_inference.py of https://huggingface.co/Alibaba-NLP/gme-Qwen2-VL-2B-Instruct
_GME = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n<|endoftext|>"
)
_GME_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


class OracleError(RuntimeError):
    """No library can compute the vectors. The message says why."""


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint, the INFO of its served model, and the operator's parameters."""

    directory: Path
    info: ModelInfo
    image_positions: str  # for qwen2_vl: mrope or sequential
    image_tokens: tuple[int, int]  # for qwen2_vl: minimum and maximum per image


@dataclass(frozen=True)
class OracleResult:
    """Vectors [n, d] of unit length; `images` is empty for a text model."""

    library: str  # name and version
    texts: Vectors
    images: Vectors


def compute(facts: CheckpointFacts, texts: Sequence[str], images: Sequence[bytes]) -> OracleResult:
    """Compute the vectors with another library.

    Raises:
        OracleError: if no library can.
    """
    for name in ("torch", "transformers"):
        if find_spec(name) is None:
            raise OracleError(f"{name} is not installed")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it warns about weights that embedding does not use
    _check_memory(facts.directory)
    modules = facts.directory / "modules.json"
    with torch.inference_mode():
        if facts.info.family == "clip":
            return OracleResult(_version("transformers"), *_clip(facts, texts, images))
        if facts.info.family == "qwen2_vl":
            return OracleResult(_version("transformers"), *_qwen2_vl(facts, texts, images))
        if facts.info.family not in _ENDS:
            raise OracleError(f"model_type '{facts.info.family}' has no comparison with transformers")
        none = np.empty((0, 0))
        if facts.info.family in _ENCODERS and modules.is_file() and find_spec("sentence_transformers") is not None:
            return OracleResult(_version("sentence-transformers"), _sentence_transformer(facts, texts), none)
        if modules.is_file() and ".Dense" in modules.read_text(encoding="utf-8"):
            raise OracleError("transformers does not support the Dense module in modules.json")
        return OracleResult(_version("transformers"), _pooled(facts, texts), none)


def _version(library: str) -> str:
    return f"{library} {metadata.version(library)}"


def _check_memory(directory: Path) -> None:
    """Check that the checkpoint fits into memory in fp32, because a machine that swaps would never finish.

    Raises:
        OracleError: if it does not fit.
    """
    from transformers import AutoConfig

    stored = getattr(AutoConfig.from_pretrained(directory, trust_remote_code=False), "dtype", None)
    widening = 4 / getattr(stored, "itemsize", 4)
    needed = widening * sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if needed > free:
        raise OracleError(f"in float32 it takes {needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are free")


def _sentence_transformer(facts: CheckpointFacts, texts: Sequence[str]) -> Vectors:
    """Compute vectors with sentence-transformers, which reads pooling, Dense and length from the checkpoint itself."""
    import torch
    from sentence_transformers import SentenceTransformer

    options = {"dtype": torch.float32}
    network = SentenceTransformer(str(facts.directory), device="cpu", model_kwargs=options, local_files_only=True)
    # Without a prompt: sentence-transformers would add the default prompt to every text.
    vectors = network.encode(list(texts), prompt="", batch_size=1, show_progress_bar=False, convert_to_tensor=True)
    return _normalize(list(vectors))


def _pooled(facts: CheckpointFacts, texts: Sequence[str]) -> Vectors:
    import torch
    from transformers import AutoModel

    pool: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "cls": lambda states: states[0],
        "mean": lambda states: states.mean(0),
        "max": lambda states: states.amax(0),
        "last": lambda states: states[-1],
    }
    rows = _ids(facts, texts)
    options = {"add_pooling_layer": False} if facts.info.family in _ENCODERS else {}
    network = _load(AutoModel, facts.directory, **options)
    pooled: dict[int, torch.Tensor] = {}
    # Dynamic RoPE scales to the longest row it has seen, so rows are computed from short to long.
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        pooled[i] = pool[facts.info.pooling](network(torch.tensor([rows[i]])).last_hidden_state[0])
    return _normalize([pooled[i] for i in range(len(rows))])


def _clip(facts: CheckpointFacts, texts: Sequence[str], images: Sequence[bytes]) -> tuple[Vectors, Vectors]:
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel

    rows = _ids(facts, texts)
    network = _load(CLIPModel, facts.directory)
    processor = CLIPImageProcessorPil.from_pretrained(facts.directory)
    pixel_values = [processor(_open(image), return_tensors="pt")["pixel_values"] for image in images]
    return (
        _normalize([network.get_text_features(torch.tensor([row])).pooler_output[0] for row in rows]),
        _normalize([network.get_image_features(pixels).pooler_output[0] for pixels in pixel_values]),
    )


def _qwen2_vl(facts: CheckpointFacts, texts: Sequence[str], images: Sequence[bytes]) -> tuple[Vectors, Vectors]:
    """Compute vectors in GME's template. transformers' combined processor cannot be loaded without torchvision."""
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(facts.directory, trust_remote_code=False)
    network = _load(Qwen2VLForConditionalGeneration, facts.directory).model
    min_pixels, max_pixels = (tokens * 28 * 28 for tokens in facts.image_tokens)
    processor = Qwen2VLImageProcessorPil.from_pretrained(facts.directory, min_pixels=min_pixels, max_pixels=max_pixels)
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def state(text: str, pixels: dict[str, Any]) -> torch.Tensor:
        ids = torch.tensor([tokenizer(_GME.format(text))["input_ids"]])
        length = ids.shape[1]
        sequential = {"position_ids": torch.arange(length).expand(3, 1, length)}
        positions = sequential if facts.image_positions == "sequential" else {}
        types = (ids == image_token).int()
        states = network(input_ids=ids, mm_token_type_ids=types, **pixels, **positions).last_hidden_state
        last: torch.Tensor = states[0, -1]
        return last

    inputs = [dict(processor(_open(image), return_tensors="pt")) for image in images]
    counts = [int(pixels["image_grid_thw"].prod()) // processor.merge_size**2 for pixels in inputs]
    templates = [_GME_IMAGE.replace("<|image_pad|>", "<|image_pad|>" * count) for count in counts]
    return (
        _normalize([state(text, {}) for text in texts]),
        _normalize([state(text, pixels) for text, pixels in zip(templates, inputs, strict=True)]),
    )


def _ids(facts: CheckpointFacts, texts: Sequence[str]) -> list[list[int]]:
    """Return token ids with special tokens, truncated to the model's length as transformers truncates."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(facts.directory, trust_remote_code=False)
    end = _ENDS.get(facts.info.family, "")
    last = tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end) if end else None
    appends_it = last is None or tokenizer("a")["input_ids"][-1] == last
    tail = [] if appends_it else [last]
    limit = facts.info.max_model_len - len(tail)
    return [tokenizer(text, truncation=True, max_length=limit)["input_ids"] + tail for text in texts]


def _load(network_class: Any, directory: Path, **options: object) -> Any:
    """Load a network.

    Raises:
        OracleError: if a tensor is missing, which transformers would fill with random numbers.
    """
    import torch

    network, report = network_class.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **options
    )
    if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise OracleError(f"transformers finds no {missing[0]} in the checkpoint")
    return network.eval()


def _open(image: bytes) -> Image.Image:
    return Image.open(io.BytesIO(image))


def _normalize(pooled: Sequence[Any]) -> Vectors:
    vectors = np.stack([vector.double().numpy() for vector in pooled])
    normalized: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalized
