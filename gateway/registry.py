"""What Triton serves, learnt from Triton alone: repository index, model configs, and each model's own INFO."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import ValidationError

from triton_embed.gateway.client import IndexEntry, TritonClient
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.model import ModelInfo

T = TypeVar("T")

log = logging.getLogger(__name__)

REFRESH_GAP_SECONDS = 0.25  # requests for unknown or broken models cause no more than this
STATES = {"LOADING": "is loading", "UNLOADING": "is being unloaded", "UNAVAILABLE": "is not loaded, see Triton's log"}


@dataclass(frozen=True, slots=True)
class Card:
    """One model of Triton's repository. Without `info` it is not ready, and `reason` says why in one line."""

    name: str  # Triton's own: the directory
    created: int  # Unix seconds, when the gateway first saw it
    version: str = ""
    aliases: tuple[str, ...] = ()  # what else it answers to: HF id, the id's last part, the config's aliases
    checkpoint: str | None = None  # HF id; None for a local directory
    info: ModelInfo | None = None
    reason: str = ""
    broken: bool = False  # Triton calls it ready, and yet it does not answer


class Registry:
    """The models by name, kept fresh by one background task. `start` in a running event loop, `stop` there."""

    def __init__(self, client: TritonClient, *, interval: float, served_name: str = "") -> None:
        self._client = client
        self._interval = interval
        self._served_name = served_name
        self._cards: dict[str, Card] = {}
        self._names: dict[str, str] = {}  # every name in lower case -> directory
        self._outage = ""  # why Triton itself does not answer
        self._wake = asyncio.Event()
        self._refreshed = -REFRESH_GAP_SECONDS
        self._refreshing: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look once, whatever the outcome, then keep looking."""
        await self.refresh()
        self._keeper = asyncio.create_task(self._keep_fresh())

    async def stop(self) -> None:
        """End the background task; a call it has sent runs on in the client."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper

    @property
    def cards(self) -> Sequence[Card]:
        """Every model of the repository, by name."""
        return [self._cards[name] for name in sorted(self._cards)]

    @property
    def ready(self) -> Sequence[ModelInfo]:
        """The models that answer."""
        return [card.info for card in self.cards if card.info is not None]

    def public_name(self, card: Card) -> str:
        """What /v1/models calls it: its directory, or served_model_name when it is the only one ready."""
        only = self._served_name and [info.name for info in self.ready] == [card.name]
        return self._served_name if only else card.name

    def suspect(self) -> None:
        """A call failed: look again without waiting for the interval to pass."""
        self._wake.set()

    async def refresh(self) -> None:
        """Ask Triton again, unless that is under way or has only just been done."""
        if self._refreshing is None or self._refreshing.done():
            if self._rest() > 0:
                return
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    async def find(self, asked: str) -> Card:
        """The model of that name, ready or not. ApiError 404: there is none; 503: Triton does not answer."""
        return await self._twice(lambda: self._card(asked))

    async def resolve(self, asked: str | None) -> ModelInfo:
        """The model to ask. None, `default` and served_model_name mean the only one that is ready.

        ApiError 404: no such model; 503: it is not ready; 400: several are ready and none was named.
        """
        return await self._twice(lambda: self._ready(asked))

    async def _twice(self, look: Callable[[], T]) -> T:
        """What cannot be found may have come since: ask Triton before saying no."""
        try:
            return look()
        except ApiError as error:
            if error.status == 400:
                raise
        await self.refresh()
        return look()

    def _ready(self, asked: str | None) -> ModelInfo:
        if self._outage:
            raise ApiError(503, self._outage)
        card = self._card(asked)
        if card.info is None:
            raise ApiError(503, card.reason, code="model_not_ready")
        return card.info

    def _card(self, asked: str | None) -> Card:
        if asked is None:
            return self._only()
        if (directory := self._names.get(asked.lower())) is not None:
            return self._cards[directory]
        if asked.lower() in ("default", self._served_name.lower()):
            return self._only()
        if self._outage:
            raise ApiError(503, self._outage)
        served = ", ".join(self.public_name(card) for card in self.cards if card.info) or "none"
        message = f"The model '{asked[:200]}' does not exist. Ready to be asked: {served}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def _only(self) -> Card:
        cards = [card for card in self.cards if card.info] or self.cards
        if len(cards) == 1:
            return cards[0]
        if not self.ready:
            raise ApiError(503, self._outage or "No model is ready", code="model_not_ready")
        names = ", ".join(card.name for card in cards)
        raise ApiError(400, f"model is required, as several are served: {names}", param="model")

    async def _keep_fresh(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(self._rest())  # a suspicion is never dropped
            await self.refresh()

    def _rest(self) -> float:
        """Seconds until Triton may be asked again."""
        return max(0.0, self._refreshed + REFRESH_GAP_SECONDS - time.monotonic())

    async def _refresh(self) -> None:
        try:
            index = await self._client.index()
        except ApiError as error:
            if error.status == 504:  # slow is not gone: what is known stays
                return
            self._outage = error.message
            cards: Iterable[Card] = [
                replace(card, info=None, reason=error.message, broken=True) for card in self._cards.values()
            ]
        else:
            self._outage = ""
            cards = await asyncio.gather(*map(self._look, _latest(index)))
        for card in cards:
            known = self._cards.get(card.name)
            if (known is not None and known.info is not None) != (card.info is not None):
                log.info("%s", card.reason or f"Model '{card.name}' is ready")
        self._cards = {card.name: card for card in cards}
        self._names = _names(self._cards.values())
        self._refreshed = time.monotonic()

    async def _look(self, entry: IndexEntry) -> Card:
        """A model's card as it is now."""
        known = self._cards.get(entry.name) or Card(entry.name, int(time.time()))
        if entry.state != "READY":
            reason = f"Model '{entry.name}' {STATES.get(entry.state, 'is not loaded')}"
            return replace(known, info=None, reason=reason, broken=False)
        try:
            if known.info is None or known.version != entry.version:
                known = _configured(known, await self._client.config(entry.name), entry.version)
            info = ModelInfo.model_validate_json(await self._client.info(entry.name))
        except ValidationError:
            reason = f"Model '{entry.name}' does not describe itself as this gateway expects"
            return replace(known, info=None, reason=reason, broken=True)
        except ApiError as error:
            if known.info is not None and error.status in (429, 504):  # busy is not gone
                return known
            broken = error.code != "model_not_ready"
            return replace(known, info=None, reason=error.message, broken=broken)
        return replace(known, info=info.model_copy(update={"name": entry.name}), reason="", broken=False)


def _latest(index: Iterable[IndexEntry]) -> Iterator[IndexEntry]:
    """One entry a model: the highest version, one that is ready first."""
    best: dict[str, IndexEntry] = {}
    for entry in sorted(index, key=lambda entry: (entry.state == "READY", len(entry.version), entry.version)):
        best[entry.name] = entry
    yield from best.values()


def _configured(card: Card, parameters: dict[str, str], version: str) -> Card:
    """The names and the id that a config.pbtxt gives: `aliases` is comma-separated, `checkpoint` an HF id or a path."""
    checkpoint = parameters.get("checkpoint", "")
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint) is not None
    names = [checkpoint, checkpoint.partition("/")[2]] if is_id else []
    names += [alias.strip() for alias in parameters.get("aliases", "").split(",") if alias.strip()]
    return replace(card, version=version, aliases=tuple(names), checkpoint=checkpoint if is_id else None)


def _names(cards: Iterable[Card]) -> dict[str, str]:
    """Every name in lower case -> directory. Directories win, then models that are ready, then the alphabet."""
    found = {card.name.lower(): card.name for card in cards}
    for card in sorted(cards, key=lambda card: (card.info is None, card.name)):
        for alias in card.aliases:
            found.setdefault(alias.lower(), card.name)
    return found
