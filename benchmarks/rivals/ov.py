"""OpenVINO engine: `python -m benchmarks.rivals.ov fp32|bf16|int8 FOLDER TOKENIZER.json TEXTS.json` is a worker.

The network is compiled twice: for LATENCY (all threads on one batch) and for THROUGHPUT (several batches at a time on
fewer threads each). Single texts use LATENCY; for many texts the faster one is selected (on 2 cores mostly LATENCY).
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import openvino as ov

from benchmarks.cpu.calls import read_pools, serve
from benchmarks.rivals.padded import Batch, Infer, Padded, Texts, feed
from benchmarks.worker import Vectors

# Model file and precision of float operations. Without a hint, OpenVINO uses bf16 if the CPU has it, also with int8.
PRECISIONS: dict[str, tuple[str, dict[str, str]]] = {
    "fp32": ("model.onnx", {"INFERENCE_PRECISION_HINT": "f32"}),
    "bf16": ("model.onnx", {"INFERENCE_PRECISION_HINT": "bf16"}),
    "int8": ("int8.xml", {}),
}


def sequential(model: ov.CompiledModel) -> Infer:
    """Return a function that runs one batch at a time."""
    request = model.create_infer_request()

    def infer(batches: Iterable[Batch], deliver: Callable[[Batch, Vectors], None]) -> None:
        for batch in batches:
            request.infer(feed(batch), share_inputs=True)
            deliver(batch, request.get_output_tensor(0).data)

    return infer


def concurrent(model: ov.CompiledModel) -> Infer:
    """Return a function that runs several batches at a time."""
    queue = ov.AsyncInferQueue(model)

    def infer(batches: Iterable[Batch], deliver: Callable[[Batch, Vectors], None]) -> None:
        queue.set_callback(lambda request, batch: deliver(batch, request.get_output_tensor(0).data))
        for batch in batches:
            queue.start_async(feed(batch), batch)
        queue.wait_all()

    return infer


def main() -> None:
    precision, folder, tokenizer, texts = sys.argv[1:]
    file, precision_hint = PRECISIONS[precision]
    core = ov.Core()
    model = core.read_model(Path(folder) / file)

    def compiled(hint: str) -> ov.CompiledModel:
        return core.compile_model(model, "CPU", {"PERFORMANCE_HINT": hint} | precision_hint)

    modes = {"LATENCY": sequential(compiled("LATENCY")), "THROUGHPUT": concurrent(compiled("THROUGHPUT"))}
    pools = read_pools(texts)
    serve(Padded(Texts(Path(tokenizer), 512), modes, pools), pools)


if __name__ == "__main__":
    main()
