"""Reference vectors of a checkpoint, by transformers: on the CPU, in fp32, one row at a time, unpadded, of unit length.

`triton-embed verify` and the tests compare the engine with them. This module shares no code with the engine.
For an encoder with a modules.json, `compute` uses sentence-transformers instead, if it is installed. These libraries
are imported only when a function runs: serving does not need them.
"""

import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil
from PIL import Image

from triton_embed.python_backend.wire import ModelInfo

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float64]  # [n, d]

# By model_type, for networks whose last hidden states are pooled: the token that the official code appends to a text.
# None: the tokenizer's eos_token; empty: no token. https://huggingface.co/intfloat/e5-mistral-7b-instruct,
# https://huggingface.co/Alibaba-NLP/gte-Qwen2-1.5B-instruct/blob/main/tokenization_qwen.py, Qwen3's tokenizer.json
_END_TOKENS = {
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
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
)
_GME_INSTRUCTION = "You are a helpful assistant."
_GME_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_PIXELS_PER_TOKEN = 28 * 28


class OracleError(RuntimeError):
    """No library can compute the vectors. The message says why."""


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint, the INFO of its served model, and the parameters of config.pbtxt that change its vectors."""

    directory: Path
    info: ModelInfo
    image_positions: str  # for qwen2_vl: mrope or sequential
    image_tokens: tuple[int, int]  # for qwen2_vl: minimum and maximum per image
    network: Path | None = None  # the sub-folder of its network, if it is in one


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
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it warns about weights that embedding does not use
    directory, family = facts.directory, facts.info.family
    _check_memory(facts.network or directory)
    files = [Image.open(io.BytesIO(image)) for image in images]
    if family == "qwen2_vl":
        items: list[Mapping[str, Any]] = [*({"text": text} for text in texts), *({"images": [file]} for file in files)]
        vectors = gme_vectors(directory, gme_inputs(directory, items, *facts.image_tokens), facts.image_positions)
        return OracleResult(_version("transformers"), vectors[: len(texts)], vectors[len(texts) :])
    if family == "clip":
        rows = token_ids(directory, texts, facts.info.max_model_len)
        by_text, by_image = clip_text_vectors(directory, rows), clip_image_vectors(directory, files)
        return OracleResult(_version("transformers"), by_text, by_image)
    if family not in _END_TOKENS:
        raise OracleError(f"model_type '{family}' has no comparison with transformers")
    modules, no_images = directory / "modules.json", np.empty((0, 0))
    if family in _ENCODERS and modules.is_file() and find_spec("sentence_transformers") is not None:
        return OracleResult(_version("sentence-transformers"), _sentence_transformer(directory, texts), no_images)
    if modules.is_file() and ".Dense" in modules.read_text(encoding="utf-8"):
        raise OracleError("transformers does not support the Dense module in modules.json")
    rows = token_ids(directory, texts, facts.info.max_model_len)
    return OracleResult(_version("transformers"), pooled_vectors(directory, rows, facts.info.pooling), no_images)


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


def _sentence_transformer(directory: Path, texts: Sequence[str]) -> Vectors:
    """Compute vectors with sentence-transformers, which reads pooling, Dense and length from the checkpoint itself."""
    import torch
    from sentence_transformers import SentenceTransformer

    options = {"dtype": torch.float32}
    network = SentenceTransformer(str(directory), device="cpu", model_kwargs=options, local_files_only=True)
    # Without a prompt: sentence-transformers would add the default prompt to every text.
    vectors = network.encode(list(texts), prompt="", batch_size=1, show_progress_bar=False, convert_to_tensor=True)
    return _normalize(list(vectors))


def token_ids(
    directory: Path, texts: Sequence[str], limit: int | None = None, *, append_end: bool = True
) -> list[list[int]]:
    """Return token ids with special tokens.

    Args:
        directory: The checkpoint.
        texts: Texts with their prompts.
        limit: Truncate to this many tokens as transformers does, special tokens included.
        append_end: Append the token that the official code of the model appends, unless the tokenizer already does.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    end = _END_TOKENS.get(model_type(directory), "")
    end_id = tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end) if end else None
    complete = not append_end or end_id is None or tokenizer("a")["input_ids"][-1] == end_id
    tail = [] if complete else [end_id]
    truncation = {} if limit is None else {"truncation": True, "max_length": limit - len(tail)}
    return [tokenizer(text, **truncation)["input_ids"] + tail for text in texts]


def hidden_states(directory: Path, rows: Sequence[Sequence[int]]) -> "list[torch.Tensor]":
    """Return the last hidden states [tokens, d] of every row of token ids, for a network without images."""
    import torch
    from transformers import AutoModel

    options = {"add_pooling_layer": False} if model_type(directory) in _ENCODERS else {}
    network = _load(AutoModel, directory, **options)
    states: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        # Dynamic RoPE scales to the longest row it has seen, so rows are computed from short to long.
        for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
            states[i] = network(torch.tensor([rows[i]])).last_hidden_state[0]
    return [states[i] for i in range(len(rows))]


def pooled_vectors(directory: Path, rows: Sequence[Sequence[int]], pooling: str) -> Vectors:
    """Return the vectors of token ids. `pooling` is cls, mean, max or last."""
    pool: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "cls": lambda states: states[0],
        "mean": lambda states: states.mean(0),
        "max": lambda states: states.amax(0),
        "last": lambda states: states[-1],
    }
    return _normalize([pool[pooling](states) for states in hidden_states(directory, rows)])


def clip_text_vectors(directory: Path, rows: Sequence[Sequence[int]]) -> Vectors:
    """Return the projected text vectors of token ids. transformers chooses the pooled token by eos_token_id."""
    import torch
    from transformers import CLIPModel

    network = _load(CLIPModel, directory)
    with torch.inference_mode():
        return _normalize([network.get_text_features(torch.tensor([row])).pooler_output[0] for row in rows])


def clip_image_vectors(directory: Path, images: Sequence[Image.Image]) -> Vectors:
    """Return the projected vectors of images, which the checkpoint's own preprocessor resizes and crops."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel

    network = _load(CLIPModel, directory)
    processor = CLIPImageProcessorPil.from_pretrained(directory)
    with torch.inference_mode():
        inputs = [processor(image, return_tensors="pt")["pixel_values"] for image in images]
        return _normalize([network.get_image_features(pixels).pooler_output[0] for pixels in inputs])


def gme_text(item: Mapping[str, Any]) -> str:
    """Return GME's chat template around an item with `text`, `images` and `instruction`, each optional."""
    user = _GME_IMAGE * len(item.get("images") or ()) + (item.get("text") or "")
    return _GME.format(system=item.get("instruction") or _GME_INSTRUCTION, user=user)


def gme_inputs(
    directory: Path, items: Iterable[Mapping[str, Any]], min_tokens: int, max_tokens: int
) -> "Iterator[dict[str, torch.Tensor]]":
    """Yield the inputs of Qwen2VLModel for each item, see `gme_text`. An image has `min_tokens` to `max_tokens` tokens.

    This does the work of Qwen2VLProcessor, which cannot be loaded without torchvision.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    min_pixels, max_pixels = (tokens * _PIXELS_PER_TOKEN for tokens in (min_tokens, max_tokens))
    processor = Qwen2VLImageProcessorPil.from_pretrained(directory, min_pixels=min_pixels, max_pixels=max_pixels)
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for item in items:
        text = gme_text(item)
        inputs = dict(processor(item["images"], return_tensors="pt")) if item.get("images") else {}
        for grid in inputs.get("image_grid_thw", ()):
            count = int(grid.prod()) // processor.merge_size**2
            text = text.replace("<|image_pad|>", "<|placeholder|>" * count, 1)
        ids = tokenizer(text.replace("<|placeholder|>", "<|image_pad|>"))["input_ids"]
        inputs["input_ids"] = torch.tensor([ids])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token).int()
        yield inputs


def gme_vectors(
    directory: Path, inputs: "Iterable[Mapping[str, torch.Tensor]]", image_positions: str = "mrope"
) -> Vectors:
    """Return the last-token vectors of a Qwen2-VL for the inputs that `gme_inputs` yields.

    `image_positions` is mrope, or sequential: the same position on all three axes.
    """
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    network = _load(Qwen2VLForConditionalGeneration, directory).model
    pooled = []
    with torch.inference_mode():
        for item in inputs:
            length = item["input_ids"].shape[1]
            sequential = {"position_ids": torch.arange(length).expand(3, 1, length)}
            positions = sequential if image_positions == "sequential" else {}
            pooled.append(network(**item, **positions).last_hidden_state[0, -1])
    return _normalize(pooled)


def model_type(directory: Path) -> str:
    """Return the model_type in the checkpoint's config.json."""
    return str(json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"])


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


def _normalize(pooled: Sequence[Any]) -> Vectors:
    if not pooled:
        return np.empty((0, 0))
    vectors = np.stack([vector.double().numpy() for vector in pooled])
    normalized: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalized
