"""What transformers or sentence-transformers make of a checkpoint: on the CPU, in float32, a row at a time, no padding.

Serving does without them: they are imported here alone, when asked for.
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

from triton_embed.gateway.model import ModelInfo

log = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float64]

# Networks whose last hidden states are pooled -> the token that the official code puts behind every text; None: the
# tokenizer's own eos_token; empty: none. https://huggingface.co/intfloat/e5-mistral-7b-instruct,
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
_GME_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


class OracleError(RuntimeError):
    """There is nobody to compare with. The message says why."""


@dataclass(frozen=True)
class Facts:
    """A checkpoint, what the served model says about it, and what the operator decided."""

    directory: Path
    info: ModelInfo
    image_positions: str  # of qwen2_vl: mrope or sequential
    image_tokens: tuple[int, int]  # of qwen2_vl: fewest and most for a picture


@dataclass(frozen=True)
class Opinion:
    """Vectors [n, d] of unit length; none for pictures where the model sees none."""

    library: str  # name and version
    texts: Vectors
    pictures: Vectors


def opinion(facts: Facts, texts: Sequence[str], pictures: Sequence[bytes]) -> Opinion:
    """What another library answers. OracleError: none can be asked."""
    for name in ("torch", "transformers"):
        if find_spec(name) is None:
            raise OracleError(f"{name} is not installed")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # weights that embedding leaves unused
    _check_memory(facts.directory)
    modules = facts.directory / "modules.json"
    with torch.inference_mode():
        if facts.info.family == "clip":
            return Opinion(_version("transformers"), *_clip(facts, texts, pictures))
        if facts.info.family == "qwen2_vl":
            return Opinion(_version("transformers"), *_qwen2_vl(facts, texts, pictures))
        if facts.info.family not in _ENDS:
            raise OracleError(f"how to ask transformers for model_type '{facts.info.family}' is not known here")
        none = np.empty((0, 0))
        if facts.info.family in _ENCODERS and modules.is_file() and find_spec("sentence_transformers") is not None:
            return Opinion(_version("sentence-transformers"), _sentence_transformer(facts, texts), none)
        if modules.is_file() and ".Dense" in modules.read_text(encoding="utf-8"):
            raise OracleError("transformers knows nothing of the Dense module in modules.json")
        return Opinion(_version("transformers"), _pooled(facts, texts), none)


def _version(library: str) -> str:
    return f"{library} {metadata.version(library)}"


def _check_memory(directory: Path) -> None:
    """A machine that starts to swap, or ends the process, answers nothing."""
    from transformers import AutoConfig

    stored = getattr(AutoConfig.from_pretrained(directory, trust_remote_code=False), "dtype", None)
    widening = 4 / getattr(stored, "itemsize", 4)
    needed = widening * sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if needed > free:
        raise OracleError(f"in float32 it takes {needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are free")


def _sentence_transformer(facts: Facts, texts: Sequence[str]) -> Vectors:
    """By modules.json: pooling, any Dense and the longest text are its own reading of the checkpoint."""
    import torch
    from sentence_transformers import SentenceTransformer

    options = {"dtype": torch.float32}
    network = SentenceTransformer(str(facts.directory), device="cpu", model_kwargs=options, local_files_only=True)
    # A default prompt would be put before every text; the server does so only when asked.
    vectors = network.encode(list(texts), prompt="", batch_size=1, show_progress_bar=False, convert_to_tensor=True)
    return _normalised(list(vectors))


def _pooled(facts: Facts, texts: Sequence[str]) -> Vectors:
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
    found: dict[int, torch.Tensor] = {}
    # Dynamic RoPE stretches to the longest row it has seen: no row may come after a longer one.
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        found[i] = pool[facts.info.pooling](network(torch.tensor([rows[i]])).last_hidden_state[0])
    return _normalised([found[i] for i in range(len(rows))])


def _clip(facts: Facts, texts: Sequence[str], pictures: Sequence[bytes]) -> tuple[Vectors, Vectors]:
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel

    rows = _ids(facts, texts)
    network = _load(CLIPModel, facts.directory)
    processor = CLIPImageProcessorPil.from_pretrained(facts.directory)
    pixels = [processor(_open(picture), return_tensors="pt")["pixel_values"] for picture in pictures]
    return (
        _normalised([network.get_text_features(torch.tensor([row])).pooler_output[0] for row in rows]),
        _normalised([network.get_image_features(one).pooler_output[0] for one in pixels]),
    )


def _qwen2_vl(facts: Facts, texts: Sequence[str], pictures: Sequence[bytes]) -> tuple[Vectors, Vectors]:
    """In GME's template. transformers' own processor of the pair cannot be loaded without torchvision."""
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(facts.directory, trust_remote_code=False)
    network = _load(Qwen2VLForConditionalGeneration, facts.directory).model
    least, most = (tokens * 28 * 28 for tokens in facts.image_tokens)
    processor = Qwen2VLImageProcessorPil.from_pretrained(facts.directory, min_pixels=least, max_pixels=most)
    picture_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def state(text: str, pixels: dict[str, Any]) -> torch.Tensor:
        ids = torch.tensor([tokenizer(_GME.format(text))["input_ids"]])
        length = ids.shape[1]
        sequential = {"position_ids": torch.arange(length).expand(3, 1, length)}
        positions = sequential if facts.image_positions == "sequential" else {}
        types = (ids == picture_token).int()
        states = network(input_ids=ids, mm_token_type_ids=types, **pixels, **positions).last_hidden_state
        last: torch.Tensor = states[0, -1]
        return last

    seen = [dict(processor(_open(picture), return_tensors="pt")) for picture in pictures]
    counts = [int(one["image_grid_thw"].prod()) // processor.merge_size**2 for one in seen]
    templates = [_GME_PICTURE.replace("<|image_pad|>", "<|image_pad|>" * count) for count in counts]
    return (
        _normalised([state(text, {}) for text in texts]),
        _normalised([state(text, one) for text, one in zip(templates, seen, strict=True)]),
    )


def _ids(facts: Facts, texts: Sequence[str]) -> list[list[int]]:
    """Token ids with special tokens, cut to the model's length as transformers cuts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(facts.directory, trust_remote_code=False)
    end = _ENDS.get(facts.info.family, "")
    last = tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end) if end else None
    ends_itself = last is None or tokenizer("a")["input_ids"][-1] == last
    tail = [] if ends_itself else [last]
    limit = facts.info.max_model_len - len(tail)
    return [tokenizer(text, truncation=True, max_length=limit)["input_ids"] + tail for text in texts]


def _load(network_class: Any, directory: Path, **options: object) -> Any:
    """OracleError: a tensor is missing, which transformers replaces by random numbers."""
    import torch

    network, report = network_class.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **options
    )
    if lacking := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise OracleError(f"transformers finds no {lacking[0]} in the checkpoint")
    return network.eval()


def _open(picture: bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture))


def _normalised(pooled: Sequence[Any]) -> Vectors:
    vectors = np.stack([vector.double().numpy() for vector in pooled])
    found: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found
