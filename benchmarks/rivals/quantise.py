"""OpenVINO's int8: `python -m benchmarks.rivals.quantise FOLDER TEXTS.json TOKENIZER.json` makes int8.xml of FOLDER's
model.onnx, by NNCF's recipe for transformers (weights and inputs, static, smoothed), calibrated on those texts.
"""

import json
import sys
from pathlib import Path

import nncf
import openvino as ov

from benchmarks.rivals.padded import Batch, Texts, feed

TEXTS = 300  # NNCF's own default


def main() -> None:
    folder, texts, tokenizer = map(Path, sys.argv[1:])
    batches = list(Texts(tokenizer, 256).batches(json.loads(texts.read_text())[:TEXTS], 1))
    model = ov.Core().read_model(folder / "model.onnx")

    def inputs(batch: Batch) -> dict[str, object]:
        return dict(feed(batch))

    quantised = nncf.quantize(
        model, nncf.Dataset(batches, inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=TEXTS
    )
    ov.save_model(quantised, folder / "int8.xml")


if __name__ == "__main__":
    main()
