"""A stand-in for Triton that computes nothing: it answers the gateway's gRPC calls from memory.

    python -m benchmarks.gateway.echo PORT

Two models ignore their input: `echo-1` returns one vector and `echo-32` returns 32, each of 1,024 values.
"""

import asyncio
import json
import sys
from typing import Any

import grpc
import numpy as np
import uvloop
from tritonclient.grpc import service_pb2

DIMENSIONS = 1024
ROWS = {"echo-1": 1, "echo-32": 32}
SERVICE = "inference.GRPCInferenceService"


def vectors(rows: int) -> Any:
    """Return seeded random unit vectors [rows, DIMENSIONS]."""
    values = np.random.default_rng(rows).standard_normal((rows, DIMENSIONS))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype("<f4")


def embedding_response(name: str, rows: int) -> bytes:
    """Return the serialized response to an embedding request."""
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


def info_response(name: str) -> bytes:
    """Return the serialized response to a request for INFO."""
    info = {
        "name": name,
        "family": "echo",
        "checkpoint": None,
        "dimensions": DIMENSIONS,
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
        "instances": 1,
    }
    text = json.dumps(info).encode()
    reply = service_pb2.ModelInferResponse(model_name=name)
    reply.outputs.add(name="INFO", datatype="UINT8", shape=[1, len(text)])
    reply.raw_output_contents.append(text)
    return bytes(reply.SerializeToString())


async def main(port: int) -> None:
    """Serve on a loopback port until terminated."""
    embeddings = {name.encode(): embedding_response(name, rows) for name, rows in ROWS.items()}
    infos = {name.encode(): info_response(name) for name in ROWS}
    index = service_pb2.RepositoryIndexResponse()
    for name in ROWS:
        index.models.add(name=name, version="1", state="READY")
    fixed = {
        "ServerLive": service_pb2.ServerLiveResponse(live=True),
        "RepositoryIndex": index,
        "ModelConfig": service_pb2.ModelConfigResponse(),
    }

    async def infer(request: bytes, _: Any) -> bytes:
        name = request[2 : 2 + request[1]]  # the first field of the message: tag, length, model name
        return infos[name] if b"INFO" in request else embeddings[name]

    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
    for method, reply in fixed.items():

        async def fixed_response(_: bytes, __: Any, body: bytes = reply.SerializeToString()) -> bytes:
            return body

        handlers[method] = grpc.unary_unary_rpc_method_handler(fixed_response)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(int(sys.argv[1])))
