"""tritonclient straight at Triton, HTTP and gRPC, beside the gateway. No gRPC call is cancelled: 2.51 can die of it."""

import random
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np
import tritonclient.grpc.aio as grpc
import tritonclient.http.aio as http
from tritonclient.utils import InferenceServerException

from benchmarks.processes import MODEL
from benchmarks.soak_good import OVERLONG
from benchmarks.soak_http import Answer, Ask
from benchmarks.soak_inputs import Input, Inputs
from benchmarks.soak_judge import Fault, Judge, tensors_refused
from benchmarks.soak_models import GME, QWEN3

OUTPUTS = ("EMBEDDING", "TOKENS", "ERROR")


class Triton:
    def __init__(self, http_port: int, grpc_port: int, inputs: Inputs, judge: Judge) -> None:
        self.clients = {
            http: http.InferenceServerClient(f"127.0.0.1:{http_port}"),
            grpc: grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}"),
        }
        self.inputs, self.judge = inputs, judge
        self.forms = ((6, "tritonclient", self.good),)
        self.bad_forms = ((3, "tritonclient refused", self.bad),)

    async def close(self) -> None:
        for client in self.clients.values():
            await client.close()

    def good(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((MODEL, QWEN3, GME))
        kind = rng.choice({MODEL: ("texts", "mean"), QWEN3: ("texts", "mean"), GME: ("texts", "pictures")}[model])
        wanted: list[Input | Fault] = [*self.inputs.draw(rng, model, kind, 8)]
        parameters: dict[str, Any] = {}
        if kind == "mean":
            parameters["long_text"] = "mean"
        elif model != GME and rng.random() < 0.3:
            wanted.insert(rng.randint(0, len(wanted)), Fault("longer than"))
            parameters |= {"on_error": "report", "truncate": "none"}
        elif model == QWEN3 and rng.random() < 0.5:
            queries = self.inputs.draw(rng, QWEN3, "queries", 8)
            return self.infer(rng, form, model, queries, {"prompt_name": "query"})
        return self.infer(rng, form, model, wanted, parameters)

    def bad(self, rng: random.Random, form: str) -> Ask:
        parameters, words = rng.choice(
            (
                ({"colour": "red"}, "Unknown parameter"),
                ({"dimensions": "8"}, "must be a whole number"),
                ({"truncate": "middle"}, "truncate must be"),
                ({"on_error": "report"}, "ERROR"),
                ({"timeout_ms": -1}, "timeout_ms must be"),
            )
        )
        wanted = self.inputs.draw(rng, MODEL, "texts", 2)
        ask = self.infer(rng, form, MODEL, wanted, parameters)
        return Ask(form, ask.send, {400: tensors_refused(words)}, request=ask.request)

    def infer(
        self,
        rng: random.Random,
        form: str,
        model: str,
        wanted: Sequence[Input | Fault],
        parameters: dict[str, Any],
    ) -> Ask:
        client = rng.choice((http, grpc))
        texts = [one.text if isinstance(one, Input) else OVERLONG for one in wanted]
        tensors = [_bytes(client, "TEXT", [[text.encode()] for text in texts])]
        if model == GME:
            pictures = [[self.inputs.pictures[name][1] for name in one.images] or [b""] for one in wanted]
            tensors.append(_bytes(client, "IMAGE", pictures))
        reports = any(isinstance(one, Fault) for one in wanted)
        outputs = [client.InferRequestedOutput(name) for name in OUTPUTS[: 3 if reports else 2]]

        async def send() -> Answer:
            try:
                reply = await self.clients[client].infer(model, tensors, outputs=outputs, parameters=parameters)
            except InferenceServerException as error:
                refused = error.status() in ("400", "StatusCode.INVALID_ARGUMENT")
                return Answer(400 if refused else 500, body=f"{error.status()} {error.message()}".encode())
            except aiohttp.ClientError as error:
                raise ConnectionError(repr(error)) from error
            found = {name: reply.as_numpy(name) for name in OUTPUTS[: 3 if reports else 2]}
            return Answer(200, tensors=found)

        told = f"{client.__name__} {model} {parameters} {texts}"
        return Ask(form, send, {200: self.judge.tensors(wanted)}, len(wanted), told.encode())


def _bytes(client: Any, name: str, rows: Sequence[Sequence[bytes]]) -> Any:
    cells = np.array(rows, dtype=np.object_)
    tensor = client.InferInput(name, cells.shape, "BYTES")
    tensor.set_data_from_numpy(cells)
    return tensor
