"""A Triton that computes nothing: the gRPC calls a gateway makes, answered from memory, in a process of its own.

    python -m benchmarks.echo PORT

Two models answer whatever they are sent: `echo-1` with one vector, `echo-32` with 32 of them, of 1,024 values each.
"""

import asyncio
import json
import sys
from typing import Any

import grpc
import numpy as np
import uvloop
from tritonclient.grpc import service_pb2

SIZE = 1024
ROWS = {"echo-1": 1, "echo-32": 32}
SERVICE = "inference.GRPCInferenceService"


def vectors(rows: int) -> Any:
    found = np.random.default_rng(rows).standard_normal((rows, SIZE))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype("<f4")


def answer(name: str, rows: int) -> bytes:
    reply = service_pb2.ModelInferResponse(model_name=name)
    outputs = {
        "EMBEDDING": ("FP32", vectors(rows)),
        "TOKENS": ("INT32", np.full((rows, 1), 8, "<i4")),
        "DROPPED": ("INT32", np.zeros((rows, 1), "<i4")),
    }
    for output, (datatype, values) in outputs.items():
        reply.outputs.add(name=output, datatype=datatype, shape=values.shape)
        reply.raw_output_contents.append(values.tobytes())
    return bytes(reply.SerializeToString())


def info(name: str) -> bytes:
    told = {
        "name": name,
        "family": "echo",
        "checkpoint": None,
        "dimensions": SIZE,
        "max_model_len": 512,
        "vocab_size": 2**31 - 1,
        "pooling": "none",
        "modalities": ["text"],
        "matryoshka": True,
        "instructions": False,
        "prompt_names": [],
        "default_prompt_name": None,
        "batch_tokens": 16_384,
        "small_tokens": 4_096,
        "max_request_tokens": 300_000,
        "dtype": "float32",
        "device": "cpu",
        "kernels": "none",
    }
    cell = json.dumps(told).encode()
    reply = service_pb2.ModelInferResponse(model_name=name)
    reply.outputs.add(name="INFO", datatype="BYTES", shape=[1, 1])
    reply.raw_output_contents.append(len(cell).to_bytes(4, "little") + cell)
    return bytes(reply.SerializeToString())


async def main(port: int) -> None:
    answers = {name.encode(): answer(name, rows) for name, rows in ROWS.items()}
    infos = {name.encode(): info(name) for name in ROWS}
    index = service_pb2.RepositoryIndexResponse()
    for name in ROWS:
        index.models.add(name=name, version="1", state="READY")
    fixed = {
        "ServerLive": service_pb2.ServerLiveResponse(live=True),
        "RepositoryIndex": index,
        "ModelConfig": service_pb2.ModelConfigResponse(),
    }

    async def infer(request: bytes, _: Any) -> bytes:
        name = request[2 : 2 + request[1]]  # the first field: its tag, its length, the model's name
        return infos[name] if b"INFO" in request else answers[name]

    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
    for method, reply in fixed.items():

        async def same(_: bytes, __: Any, body: bytes = reply.SerializeToString()) -> bytes:
            return body

        handlers[method] = grpc.unary_unary_rpc_method_handler(same)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(int(sys.argv[1])))
