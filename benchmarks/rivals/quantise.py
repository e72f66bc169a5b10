"""Quantize a model to int8 for OpenVINO: `python -m benchmarks.rivals.quantise FOLDER TEXTS.json TOKENIZER.json`.

Writes int8.xml from FOLDER's model.onnx with NNCF's preset for transformers (static quantization of weights and inputs,
with smoothing), calibrated on the texts.
"""

import json
import sys
from pathlib import Path

import nncf
import openvino as ov

from benchmarks.rivals.padded import Batch, Texts, feed

TEXTS = 300  # NNCF's default


def main() -> None:
    folder, texts, tokenizer = map(Path, sys.argv[1:])
    batches = list(Texts(tokenizer, 256).batches(json.loads(texts.read_text())[:TEXTS], 1))
    model = ov.Core().read_model(folder / "model.onnx")

    def inputs(batch: Batch) -> dict[str, object]:
        return dict(feed(batch))

    quantized = nncf.quantize(
        model, nncf.Dataset(batches, inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=TEXTS
    )
    ov.save_model(quantized, folder / "int8.xml")


if __name__ == "__main__":
    main()
