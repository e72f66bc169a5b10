"""OpenVINO: `python -m benchmarks.rivals.ov fp32|bf16|int8 FOLDER TOKENIZER.json TEXTS.json` is a worker.

The same network compiled twice: for LATENCY, all threads on one batch, and for THROUGHPUT, several batches at a time
on fewer threads each. Which is better for many texts is tried; on 2 cores it mostly is LATENCY. One text gets LATENCY.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import openvino as ov

from benchmarks.calls import read_pools, serve
from benchmarks.rivals.padded import Batch, Infer, Padded, Texts, feed
from benchmarks.worker import Vectors

# file, and what floats are computed in; OpenVINO itself takes bf16 where the CPU has it, beside int8 too
PRECISIONS: dict[str, tuple[str, dict[str, str]]] = {
    "fp32": ("model.onnx", {"INFERENCE_PRECISION_HINT": "f32"}),
    "bf16": ("model.onnx", {"INFERENCE_PRECISION_HINT": "bf16"}),
    "int8": ("int8.xml", {}),
}


def one_by_one(model: ov.CompiledModel) -> Infer:
    request = model.create_infer_request()

    def infer(batches: Iterable[Batch], take: Callable[[Batch, Vectors], None]) -> None:
        for batch in batches:
            request.infer(feed(batch), share_inputs=True)
            take(batch, request.get_output_tensor(0).data)

    return infer


def several(model: ov.CompiledModel) -> Infer:
    queue = ov.AsyncInferQueue(model)

    def infer(batches: Iterable[Batch], take: Callable[[Batch, Vectors], None]) -> None:
        queue.set_callback(lambda request, batch: take(batch, request.get_output_tensor(0).data))
        for batch in batches:
            queue.start_async(feed(batch), batch)
        queue.wait_all()

    return infer


def main() -> None:
    precision, folder, tokenizer, texts = sys.argv[1:]
    file, floats = PRECISIONS[precision]
    core = ov.Core()
    model = core.read_model(Path(folder) / file)

    def compiled(hint: str) -> ov.CompiledModel:
        return core.compile_model(model, "CPU", {"PERFORMANCE_HINT": hint} | floats)

    ways = {"LATENCY": one_by_one(compiled("LATENCY")), "THROUGHPUT": several(compiled("THROUGHPUT"))}
    pools = read_pools(texts)
    serve(Padded(Texts(Path(tokenizer), 512), ways, pools), pools)


if __name__ == "__main__":
    main()
