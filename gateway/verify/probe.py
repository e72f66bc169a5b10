"""Start a private tritonserver, compute the vectors that `verify` compares, and stop it."""

import asyncio
import logging
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from triton_embed.gateway.api.inputs import Prompt
from triton_embed.gateway.api.requests import EmbeddingRequest, Embeddings
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.media.safe_fetch import Fetcher, FetchError
from triton_embed.gateway.process.triton_process import TritonOptions, TritonProcess
from triton_embed.gateway.triton.client import TritonClient
from triton_embed.gateway.triton.model_info import read_info
from triton_embed.gateway.verify import samples
from triton_embed.gateway.verify.model_cards import Float32Array, Input
from triton_embed.python_backend.wire import ModelInfo

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
ANSWER_SECONDS = 3600.0  # billions of parameters are slow on a CPU


class ProbeError(RuntimeError):
    """The model does not load or does not answer. The message is for the operator."""


@dataclass(frozen=True)
class ProbeResult:
    """The vectors of a model. The n samples are `texts`, then `images`."""

    info: ModelInfo
    cards: dict[Input, Float32Array]  # of the cards' inputs that could be embedded
    texts: Sequence[str]
    images: Sequence[bytes]
    together: Embeddings  # all samples in one request
    alone: Float32Array  # [n, d], each sample in a separate request

    @property
    def names(self) -> list[str]:
        """A name for each sample."""
        return [*self.texts, *(f"image {i}" for i in range(len(self.images)))]


def probe(options: TritonOptions, model: str, inputs: Sequence[Input], folder: Path | None) -> ProbeResult:
    """Serve a model and return the vectors of `inputs` and of the samples.

    Args:
        options: Its ports are replaced by free ones.
        inputs: Inputs of model cards.
        folder: Directory of images that cards name by URL; those it does not contain are fetched.

    Raises:
        ProbeError: if the model does not load or does not answer.
    """
    with ExitStack() as open_sockets:
        listeners = [open_sockets.enter_context(socket.socket()) for _ in options.ports]
        for listener in listeners:
            listener.bind((options.address, 0))
        http, grpc, metrics = (listener.getsockname()[1] for listener in listeners)
    options = replace(options, http_port=http, grpc_port=grpc, metrics_port=metrics)
    try:
        return asyncio.run(_serve_and_probe(options, model, inputs, folder))
    except ApiError as error:
        raise ProbeError(error.message) from None


async def _serve_and_probe(
    options: TritonOptions, model: str, inputs: Sequence[Input], folder: Path | None
) -> ProbeResult:
    process = await TritonProcess.start(options)
    client = TritonClient(f"{options.address}:{options.grpc_port}")
    ended = asyncio.create_task(process.wait_for_end())
    probing = asyncio.create_task(_probe(client, model, inputs, folder))
    try:
        # The model's process can die meanwhile, for example when memory runs out. Its calls would then never end.
        await asyncio.wait((ended, probing), return_when=asyncio.FIRST_COMPLETED)
        if not probing.done():
            raise ProbeError(f"{await ended}; --log-level debug shows its whole log")
        return await probing
    finally:
        log.info("stopping tritonserver")
        for task in (ended, probing):
            task.cancel()
        await asyncio.gather(ended, probing, return_exceptions=True)
        await process.stop()
        await client.close()


async def _probe(client: TritonClient, model: str, inputs: Sequence[Input], folder: Path | None) -> ProbeResult:
    await _wait_until_loaded(client, model)
    info = read_info(await client.info(model))
    files = await _image_files({item.image for item in inputs if item.image}, folder)
    cards = await _card_vectors(client, info, inputs, files)
    texts = samples.TEXTS
    images = tuple(samples.images()) if "image" in info.modalities else ()
    log.info("embedding %d texts and %d images, together and alone", len(texts), len(images))
    rows = [*((text, ()) for text in texts), *(("", (image,)) for image in images)]
    together = await _embed(client, info, rows)
    alone = [(await _embed(client, info, [row])).vectors[0] for row in rows]
    return ProbeResult(info, cards, texts, images, together, np.stack(alone))


async def _wait_until_loaded(client: TritonClient, model: str) -> None:
    """Wait until the model is loaded. If it cannot be, `TritonProcess.wait_for_end` says so."""
    while True:
        with suppress(ApiError):  # Triton does not answer before its models are loaded
            if any(entry.name == model and entry.state == "READY" for entry in await client.index()):
                return
        await asyncio.sleep(POLL_SECONDS)


async def _image_files(urls: set[str], folder: Path | None) -> dict[str, bytes]:
    """Return the file behind each URL that can be read or fetched."""
    files: dict[str, bytes] = {}
    fetcher = Fetcher()
    try:
        for url in sorted(urls):
            name = unquote(urlsplit(url).path).rpartition("/")[2]
            if folder is not None and (folder / name).is_file():
                files[url] = (folder / name).read_bytes()
                continue
            try:
                files[url] = await fetcher.get(url)
            except FetchError as error:
                log.error("%s could not be fetched: %s. --images DIR looks for %s in DIR", url, error, name)
    finally:
        await fetcher.close()
    return files


async def _card_vectors(
    client: TritonClient, info: ModelInfo, inputs: Sequence[Input], files: Mapping[str, bytes]
) -> dict[Input, Float32Array]:
    """Embed the inputs of cards, one request per instruction. Inputs that the model refuses are left out."""
    vectors: dict[Input, Float32Array] = {}
    available = [item for item in dict.fromkeys(inputs) if not item.image or item.image in files]
    for instruction in dict.fromkeys(item.instruction for item in available):
        group = [item for item in available if item.instruction == instruction]
        rows = [(item.text, (files[item.image],) if item.image else ()) for item in group]
        log.info("embedding %d inputs of the model's card", len(group))
        try:
            reply = await _embed(client, info, rows, instruction)
        except ApiError as error:
            if error.status != 400:
                raise
            log.error("the model refuses the card's inputs: %s", error.message)
        else:
            vectors.update(zip(group, reply.vectors, strict=True))
    return vectors


async def _embed(
    client: TritonClient,
    info: ModelInfo,
    rows: Sequence[tuple[str, Sequence[bytes]]],
    instruction: str | None = None,
) -> Embeddings:
    texts = [text for text, _ in rows]
    prompt = Prompt(instruction)
    request = EmbeddingRequest(model=None, texts=texts, ids=[], single=False, param="input", prompt=prompt)
    images = [files for _, files in rows] if "image" in info.modalities else None
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await client.embed(info.name, request, range(len(rows)), images)
    except TimeoutError:
        raise ApiError(504, f"No answer within {ANSWER_SECONDS:g} s") from None
