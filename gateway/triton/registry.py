"""The models that Triton serves, as Triton reports them: repository index, model configs, and each model's INFO."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import ValidationError

from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.triton.client import IndexEntry, TritonClient
from triton_embed.gateway.triton.model_info import read_info
from triton_embed.python_backend.wire import ModelInfo

T = TypeVar("T")

log = logging.getLogger(__name__)

REFRESH_GAP_SECONDS = 0.25  # shortest time between refreshes, however many requests name unknown or broken models
STATES = {"LOADING": "is loading", "UNLOADING": "is being unloaded", "UNAVAILABLE": "is not loaded, see Triton's log"}


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of Triton's repository. Without `info` it is not ready, and `reason` says why in one line."""

    name: str  # the directory, which is Triton's name
    created: int  # Unix seconds, when the gateway first saw it
    version: str = ""
    aliases: tuple[str, ...] = ()  # other names: HF id, the last part of the id, aliases of the config
    checkpoint: str | None = None  # HF id; None for a local directory
    info: ModelInfo | None = None
    reason: str = ""
    broken: bool = False  # Triton reports it as ready, but it does not answer


class Registry:
    """The models by name, refreshed by a background task. Start and stop it in the same running event loop."""

    def __init__(self, client: TritonClient, *, interval: float, served_name: str = "") -> None:
        self._client = client
        self._interval = interval
        self._served_name = served_name
        self._entries: dict[str, ModelEntry] = {}
        self._names: dict[str, str] = {}  # any name in lower case -> directory
        self._outage = ""  # why Triton does not answer; empty if it does
        self._wake = asyncio.Event()
        self._refreshed_at = -REFRESH_GAP_SECONDS  # on the monotonic clock
        self._refreshing: asyncio.Task[None] | None = None
        self._background: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Refresh once, whatever the outcome, then start the background task."""
        await self.refresh()
        self._background = asyncio.create_task(self._keep_fresh())

    async def stop(self) -> None:
        """Stop the background task. A call it has sent continues in the client."""
        tasks = [task for task in (self._background, self._refreshing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def entries(self) -> Sequence[ModelEntry]:
        """Every model of the repository, sorted by name."""
        return [self._entries[name] for name in sorted(self._entries)]

    @property
    def ready(self) -> Sequence[ModelInfo]:
        """The models that are ready."""
        return [entry.info for entry in self.entries if entry.info is not None]

    def public_name(self, entry: ModelEntry) -> str:
        """Return the id in /v1/models: the directory, or served_model_name if only this model is ready."""
        only = self._served_name and [info.name for info in self.ready] == [entry.name]
        return self._served_name if only else entry.name

    def refresh_soon(self) -> None:
        """Refresh soon, because a call failed."""
        self._wake.set()

    async def refresh(self) -> None:
        """Refresh now, unless a refresh is running or has just ended."""
        if self._refreshing is None or self._refreshing.done():
            if self._seconds_to_wait() > 0:
                return
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    async def find(self, name: str) -> ModelEntry:
        """Return the model of this name, ready or not.

        Raises:
            ApiError: 404 if there is none; 503 if Triton does not answer.
        """
        return await self._retry_once(lambda: self._entry(name))

    async def resolve(self, name: str | None) -> ModelInfo:
        """Return the ready model of this name. None, `default` and served_model_name mean the only one that is ready.

        Raises:
            ApiError: 404 if there is none; 503 if it is not ready; 400 if several are ready and none is named.
        """
        return await self._retry_once(lambda: self._ready_model(name))

    async def _retry_once(self, look_up: Callable[[], T]) -> T:
        """Look up a model; on a miss, refresh once and look up again."""
        try:
            return look_up()
        except ApiError as error:
            if error.status == 400:
                raise
        await self.refresh()
        return look_up()

    def _ready_model(self, name: str | None) -> ModelInfo:
        if self._outage:
            raise ApiError(503, self._outage)
        entry = self._entry(name)
        if entry.info is None:
            raise ApiError(503, entry.reason, code="model_not_ready")
        return entry.info

    def _entry(self, name: str | None) -> ModelEntry:
        if name is None:
            return self._only_model()
        for spelling in _spellings(name.lower()):
            if (directory := self._names.get(spelling)) is not None:
                return self._entries[directory]
        if name.lower() in ("default", self._served_name.lower()):
            return self._only_model()
        if self._outage:
            raise ApiError(503, self._outage)
        available = ", ".join(self.public_name(entry) for entry in self.entries if entry.info) or "none"
        message = f"The model '{name[:200]}' does not exist. Available models: {available}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def _only_model(self) -> ModelEntry:
        """Return the only model that is ready; if none is, the only model of the repository."""
        entries = [entry for entry in self.entries if entry.info] or self.entries
        if len(entries) == 1:
            return entries[0]
        if not self.ready:
            raise ApiError(503, self._outage or "No model is ready", code="model_not_ready")
        names = ", ".join(entry.name for entry in entries)
        raise ApiError(400, f"model is required because several are served: {names}", param="model")

    async def _keep_fresh(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._wake.wait()
            self._wake.clear()
            # Within the gap `refresh` would do nothing, and the failure behind `refresh_soon` would be ignored.
            await asyncio.sleep(self._seconds_to_wait())
            await self.refresh()

    def _seconds_to_wait(self) -> float:
        """Return the seconds until the next refresh is allowed."""
        return max(0.0, self._refreshed_at + REFRESH_GAP_SECONDS - time.monotonic())

    async def _refresh(self) -> None:
        try:
            index = await self._client.index()
        except ApiError as error:
            if error.status == 504:  # slow, not gone: keep the entries
                return
            self._outage = error.message
            entries: Iterable[ModelEntry] = [
                replace(entry, info=None, reason=error.message, broken=True) for entry in self._entries.values()
            ]
        else:
            self._outage = ""
            entries = await asyncio.gather(*map(self._describe, _latest(index)))
        for entry in entries:
            previous = self._entries.get(entry.name)
            if (previous is not None and previous.info is not None) != (entry.info is not None):
                log.info("%s", entry.reason or f"Model '{entry.name}' is ready")
        self._entries = {entry.name: entry for entry in entries}
        self._names = _names(self._entries.values())
        self._refreshed_at = time.monotonic()

    async def _describe(self, indexed: IndexEntry) -> ModelEntry:
        """Return the current entry of a model in Triton's index."""
        entry = self._entries.get(indexed.name) or ModelEntry(indexed.name, int(time.time()))
        if indexed.state != "READY":
            reason = f"Model '{entry.name}' {STATES.get(indexed.state, 'is not loaded')}"
            return replace(entry, info=None, reason=reason, broken=False)
        try:
            if entry.info is None or entry.version != indexed.version:
                entry = _configured(entry, await self._client.config(entry.name), indexed.version)
            info = read_info(await self._client.info(entry.name))
        except ValidationError:
            reason = f"Model '{entry.name}' returned an INFO output that this gateway cannot read"
            return replace(entry, info=None, reason=reason, broken=True)
        except ApiError as error:
            if entry.info is not None and error.status in (429, 504):  # busy, not gone
                return entry
            broken = error.code != "model_not_ready"
            return replace(entry, info=None, reason=error.message, broken=broken)
        return replace(entry, info=replace(info, name=entry.name), reason="", broken=False)


def _latest(index: Iterable[IndexEntry]) -> Iterator[IndexEntry]:
    """Yield one entry per model: the highest version that is ready, else the highest version."""
    best: dict[str, IndexEntry] = {}
    for entry in sorted(index, key=lambda entry: (entry.state == "READY", len(entry.version), entry.version)):
        best[entry.name] = entry
    yield from best.values()


def _configured(entry: ModelEntry, parameters: dict[str, str], version: str) -> ModelEntry:
    """Return an entry with the names in its config.pbtxt.

    `aliases` is comma-separated, and `checkpoint` is an HF id or a path.
    """
    checkpoint = parameters.get("checkpoint", "")
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint) is not None
    names = [checkpoint, checkpoint.partition("/")[2]] if is_id else []
    names += [alias.strip() for alias in parameters.get("aliases", "").split(",") if alias.strip()]
    return replace(entry, version=version, aliases=tuple(names), checkpoint=checkpoint if is_id else None)


def _spellings(name: str) -> Iterator[str]:
    """Yield a name, then as it is without what LiteLLM puts before it and Ollama behind it."""
    yield name
    bare = name.removeprefix("openai/")
    yield bare
    yield name.removesuffix(":latest")
    yield bare.removesuffix(":latest")


def _names(entries: Iterable[ModelEntry]) -> dict[str, str]:
    """Return every name in lower case -> directory.

    If several models have a name, the model whose directory has it wins, then ready models, then alphabetical order.
    """
    names = {entry.name.lower(): entry.name for entry in entries}
    for entry in sorted(entries, key=lambda entry: (entry.info is None, entry.name)):
        for alias in entry.aliases:
            names.setdefault(alias.lower(), entry.name)
    return names
