"""A private tritonserver that serves one model, is asked all that `verify` wants to know, and is stopped again."""

import asyncio
import logging
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from triton_embed.gateway import samples
from triton_embed.gateway.cards import Input, Vector
from triton_embed.gateway.client import TritonClient
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.fetch import Fetcher, FetchError
from triton_embed.gateway.items import Prompt
from triton_embed.gateway.model import ModelInfo
from triton_embed.gateway.schemas import EmbeddingRequest, Embeddings
from triton_embed.gateway.triton_process import TritonOptions, TritonProcess

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
ANSWER_SECONDS = 3600.0  # billions of parameters on a CPU take their time


class ExamineError(RuntimeError):
    """The model cannot be asked. The message is for the operator."""


@dataclass(frozen=True)
class Answers:
    """What the model said. The samples are `texts`, then `pictures`; vectors are [n, d]."""

    info: ModelInfo
    cards: dict[Input, Vector]  # those that could be asked
    texts: Sequence[str]
    pictures: Sequence[bytes]
    together: Embeddings  # of every sample in one request
    alone: Vector  # of each sample in a request of its own

    @property
    def names(self) -> list[str]:
        """What each sample may be called."""
        return [*self.texts, *(f"picture {i}" for i in range(len(self.pictures)))]


def examine(options: TritonOptions, model: str, inputs: Sequence[Input], folder: Path | None) -> Answers:
    """Ask for the vectors of `inputs` and of the samples. Images are looked up in `folder` by name, else fetched.

    The ports in `options` are replaced by free ones. ExamineError: the model does not load, or does not answer.
    """
    with ExitStack() as held:
        listeners = [held.enter_context(socket.socket()) for _ in options.ports]
        for listener in listeners:
            listener.bind((options.address, 0))
        http, grpc, metrics = (listener.getsockname()[1] for listener in listeners)
    options = replace(options, http_port=http, grpc_port=grpc, metrics_port=metrics)
    try:
        return asyncio.run(_examine(options, model, inputs, folder))
    except ApiError as error:
        raise ExamineError(error.message) from None


async def _examine(options: TritonOptions, model: str, inputs: Sequence[Input], folder: Path | None) -> Answers:
    process = await TritonProcess.start(options)
    client = TritonClient(
        f"{options.address}:{options.grpc_port}",
        repository_header=options.repository_header,
    )
    ended = asyncio.create_task(process.end())
    asking = asyncio.create_task(_ask(client, model, inputs, folder))
    try:
        # A model's process can die while it is asked, of too little memory for one: nothing would ever be answered.
        await asyncio.wait((ended, asking), return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise ExamineError(f"{await ended}; --log-level debug shows its whole log")
        return await asking
    finally:
        log.info("stopping tritonserver")
        for task in (ended, asking):
            task.cancel()
        await asyncio.gather(ended, asking, return_exceptions=True)
        await process.stop()
        await client.close()


async def _ask(client: TritonClient, model: str, inputs: Sequence[Input], folder: Path | None) -> Answers:
    await _loaded(client, model)
    info = ModelInfo.model_validate_json(await client.info(model))
    files = await _files({one.image for one in inputs if one.image}, folder)
    cards = await _card_vectors(client, info, inputs, files)
    texts = samples.TEXTS
    pictures = tuple(samples.pictures()) if "image" in info.modalities else ()
    log.info("asking for %d texts and %d pictures, together and alone", len(texts), len(pictures))
    rows = [*((text, ()) for text in texts), *(("", (picture,)) for picture in pictures)]
    together = await _embed(client, info, rows)
    alone = [(await _embed(client, info, [row])).vectors[0] for row in rows]
    return Answers(info, cards, texts, pictures, together, np.stack(alone))


async def _loaded(client: TritonClient, model: str) -> None:
    """Triton answers when it has loaded what it was started with."""
    while True:
        try:
            states = {entry.name: entry.state for entry in await client.index()}
        except ApiError:
            await asyncio.sleep(POLL_SECONDS)
            continue
        if states.get(model) != "READY":
            raise ExamineError(f"model '{model}' did not load: the reason is in the log above")
        return


async def _files(urls: set[str], folder: Path | None) -> dict[str, bytes]:
    """The image behind each URL that could be had."""
    found: dict[str, bytes] = {}
    fetcher = Fetcher()
    try:
        for url in sorted(urls):
            name = unquote(urlsplit(url).path).rpartition("/")[2]
            if folder is not None and (folder / name).is_file():
                found[url] = (folder / name).read_bytes()
                continue
            try:
                found[url] = await fetcher.get(url)
            except FetchError as error:
                log.error("%s could not be fetched: %s. --images DIR looks for %s in DIR", url, error, name)
    finally:
        await fetcher.close()
    return found


async def _card_vectors(
    client: TritonClient, info: ModelInfo, inputs: Sequence[Input], files: Mapping[str, bytes]
) -> dict[Input, Vector]:
    """A request has one instruction; what the model refuses is left out."""
    found: dict[Input, Vector] = {}
    can = [one for one in dict.fromkeys(inputs) if not one.image or one.image in files]
    for instruction in dict.fromkeys(one.instruction for one in can):
        group = [one for one in can if one.instruction == instruction]
        rows = [(one.text, (files[one.image],) if one.image else ()) for one in group]
        log.info("asking for %d inputs of the model's card", len(group))
        try:
            reply = await _embed(client, info, rows, instruction)
        except ApiError as error:
            if error.status != 400:
                raise
            log.error("the model refuses the card's inputs: %s", error.message)
        else:
            found.update(zip(group, reply.vectors, strict=True))
    return found


async def _embed(
    client: TritonClient,
    info: ModelInfo,
    rows: Sequence[tuple[str, Sequence[bytes]]],
    instruction: str | None = None,
) -> Embeddings:
    texts = [text for text, _ in rows]
    prompt = Prompt(instruction)
    request = EmbeddingRequest(model=None, texts=texts, ids=[], single=False, param="input", prompt=prompt)
    images = [pictures for _, pictures in rows] if "image" in info.modalities else None
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await client.embed(info.name, request, range(len(rows)), images)
    except TimeoutError:
        raise ApiError(504, f"No answer within {ANSWER_SECONDS:g} s") from None
