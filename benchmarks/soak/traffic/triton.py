"""Soak traffic sent directly to Triton by tritonclient over HTTP and gRPC.

gRPC calls are never canceled: that can crash tritonserver 2.51.
"""

import random
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np
import tritonclient.grpc.aio as grpc
import tritonclient.http.aio as http
from tritonclient.utils import InferenceServerException

from benchmarks.processes import MODEL
from benchmarks.soak.client import Response, SoakCase
from benchmarks.soak.inputs import Input, Inputs
from benchmarks.soak.judge import Checker, ExpectedError, expect_triton_error
from benchmarks.soak.models import GME, QWEN3
from benchmarks.soak.traffic.valid import OVERLONG

OUTPUTS = ("EMBEDDING", "TOKENS", "ERROR")


class TritonTraffic:
    """Creates valid and invalid requests to Triton."""

    def __init__(self, http_port: int, grpc_port: int, inputs: Inputs, checker: Checker) -> None:
        self.clients = {
            http: http.InferenceServerClient(f"127.0.0.1:{http_port}"),
            grpc: grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}"),
        }
        self.inputs, self.checker = inputs, checker
        self.forms = ((6, "tritonclient", self.valid),)
        self.invalid_forms = ((3, "tritonclient refused", self.invalid),)

    async def close(self) -> None:
        """Close the clients."""
        for client in self.clients.values():
            await client.close()

    def valid(self, rng: random.Random, form: str) -> SoakCase:
        """Create a valid request."""
        model = rng.choice((MODEL, QWEN3, GME))
        kind = rng.choice({MODEL: ("texts", "mean"), QWEN3: ("texts", "mean"), GME: ("texts", "images")}[model])
        expected: list[Input | ExpectedError] = [*self.inputs.draw(rng, model, kind, 8)]
        parameters: dict[str, Any] = {}
        if kind == "mean":
            parameters["long_text"] = "mean"
        elif model != GME and rng.random() < 0.3:
            expected.insert(rng.randint(0, len(expected)), ExpectedError("longer than"))
            parameters |= {"on_error": "report", "truncate": "none"}
        elif model == QWEN3 and rng.random() < 0.5:
            queries = self.inputs.draw(rng, QWEN3, "queries", 8)
            return self.infer(rng, form, model, queries, {"prompt_name": "query"})
        return self.infer(rng, form, model, expected, parameters)

    def invalid(self, rng: random.Random, form: str) -> SoakCase:
        """Create a request that Triton must reject."""
        parameters, phrase = rng.choice(
            (
                ({"colour": "red"}, "Unknown parameter"),
                ({"dimensions": "8"}, "must be a whole number"),
                ({"truncate": "middle"}, "truncate must be"),
                ({"on_error": "report"}, "ERROR"),
                ({"timeout_ms": -1}, "timeout_ms must be"),
            )
        )
        expected = self.inputs.draw(rng, MODEL, "texts", 2)
        case = self.infer(rng, form, MODEL, expected, parameters)
        return SoakCase(form, case.send, {400: expect_triton_error(phrase)}, request=case.request)

    def infer(
        self,
        rng: random.Random,
        form: str,
        model: str,
        expected: Sequence[Input | ExpectedError],
        parameters: dict[str, Any],
    ) -> SoakCase:
        """Create a request with a random client. The outputs include ERROR if an error is expected."""
        client = rng.choice((http, grpc))
        texts = [item.text if isinstance(item, Input) else OVERLONG for item in expected]
        tensors = [_bytes_tensor(client, "TEXT", [[text.encode()] for text in texts])]
        if model == GME:
            images = [[self.inputs.image_files[name][1] for name in item.images] or [b""] for item in expected]
            tensors.append(_bytes_tensor(client, "IMAGE", images))
        has_errors = any(isinstance(item, ExpectedError) for item in expected)
        outputs = [client.InferRequestedOutput(name) for name in OUTPUTS[: 3 if has_errors else 2]]

        async def send() -> Response:
            try:
                result = await self.clients[client].infer(model, tensors, outputs=outputs, parameters=parameters)
            except InferenceServerException as error:
                refused = error.status() in ("400", "StatusCode.INVALID_ARGUMENT")
                return Response(400 if refused else 500, body=f"{error.status()} {error.message()}".encode())
            except aiohttp.ClientError as error:
                raise ConnectionError(repr(error)) from error
            arrays = {name: result.as_numpy(name) for name in OUTPUTS[: 3 if has_errors else 2]}
            return Response(200, tensors=arrays)

        description = f"{client.__name__} {model} {parameters} {texts}"
        return SoakCase(form, send, {200: self.checker.tensors(expected)}, len(expected), description.encode())


def _bytes_tensor(client: Any, name: str, rows: Sequence[Sequence[bytes]]) -> Any:
    cells = np.array(rows, dtype=np.object_)
    tensor = client.InferInput(name, cells.shape, "BYTES")
    tensor.set_data_from_numpy(cells)
    return tensor
