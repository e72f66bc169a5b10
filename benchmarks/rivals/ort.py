"""ONNX Runtime engine: `python -m benchmarks.rivals.ort fp32|int8 FOLDER TOKENIZER.json TEXTS.json` is a worker."""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import onnxruntime

from benchmarks.cpu.calls import read_pools, serve
from benchmarks.rivals.padded import Batch, Infer, Padded, Texts, feed
from benchmarks.worker import Vectors


def session(model: Path) -> Infer:
    """Load a model and return the function that runs batches."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    ort_session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    types = {node.name: "int32" if node.type == "tensor(int32)" else "int64" for node in ort_session.get_inputs()}

    def infer(batches: Iterable[Batch], deliver: Callable[[Batch, Vectors], None]) -> None:
        for batch in batches:
            inputs = {name: ids.astype(types[name], copy=False) for name, ids in feed(batch).items()}
            deliver(batch, ort_session.run(None, inputs)[0])

    return infer


def main() -> None:
    precision, folder, tokenizer, texts = sys.argv[1:]
    pools = read_pools(texts)
    modes = {"one session": session(Path(folder) / f"{precision}.onnx")}
    serve(Padded(Texts(Path(tokenizer), 512), modes, pools), pools)


if __name__ == "__main__":
    main()
