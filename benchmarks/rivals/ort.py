"""ONNX Runtime: `python -m benchmarks.rivals.ort fp32|int8 FOLDER TOKENIZER.json TEXTS.json` is a worker."""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import onnxruntime

from benchmarks.calls import read_pools, serve
from benchmarks.rivals.padded import Batch, Infer, Padded, Texts, feed
from benchmarks.worker import Vectors


def session(model: Path) -> Infer:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    running = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    wanted = {given.name: given.type for given in running.get_inputs()}
    types = {name: "int32" if kind == "tensor(int32)" else "int64" for name, kind in wanted.items()}

    def infer(batches: Iterable[Batch], take: Callable[[Batch, Vectors], None]) -> None:
        for batch in batches:
            given = {name: ids.astype(types[name], copy=False) for name, ids in feed(batch).items()}
            take(batch, running.run(None, given)[0])

    return infer


def main() -> None:
    precision, folder, tokenizer, texts = sys.argv[1:]
    pools = read_pools(texts)
    ways = {"one session": session(Path(folder) / f"{precision}.onnx")}
    serve(Padded(Texts(Path(tokenizer), 512), ways, pools), pools)


if __name__ == "__main__":
    main()
