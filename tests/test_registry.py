"""Which model a name means, and what is known of one: against a scripted Triton, then the real one."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import orjson
import pytest
from test_model import INFO

from conftest import Triton, free_port
from triton_embed.gateway import registry as registry_module
from triton_embed.gateway.client import IndexEntry, TritonClient
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.registry import Registry

T = TypeVar("T")


class Script(TritonClient):
    """A Triton whose answers are set by hand: `models` maps a name to its INFO or to the error it answers."""

    def __init__(self, **models: ApiError | bytes | None) -> None:
        self.models: dict[str, ApiError | bytes | None] = models
        self.states: dict[str, str] = {}
        self.configs: dict[str, dict[str, str]] = {}
        self.down: ApiError | None = None
        self.asked: list[str] = []

    async def index(self) -> list[IndexEntry]:
        self.asked.append("index")
        if self.down is not None:
            raise self.down
        return [IndexEntry(name, "1", self.states.get(name, "READY")) for name in self.models]

    async def config(self, model: str) -> dict[str, str]:
        self.asked.append(f"config {model}")
        return self.configs.get(model, {})

    async def info(self, model: str) -> bytes:
        self.asked.append(f"info {model}")
        answer = self.models[model]
        if isinstance(answer, ApiError):
            raise answer
        return INFO.model_dump_json().encode() if answer is None else answer


NO_CHECKPOINT = ApiError(503, "Model 'b' has no checkpoint.", code="model_not_ready")
UNREACHABLE = ApiError(503, "The inference server cannot be reached")


@pytest.fixture(autouse=True)
def _no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "REFRESH_GAP_SECONDS", 0.0)


def with_registry(client: TritonClient, use: Callable[[Registry], Awaitable[T]], served_name: str = "") -> T:
    async def run() -> T:
        registry = Registry(client, interval=60, served_name=served_name)
        await registry.start()
        try:
            return await use(registry)
        finally:
            await registry.stop()

    return asyncio.run(run())


def resolved(client: TritonClient, asked: str | None, served_name: str = "") -> str:
    async def use(registry: Registry) -> str:
        return (await registry.resolve(asked)).name

    return with_registry(client, use, served_name)


def refused(client: TritonClient, asked: str | None, served_name: str = "") -> ApiError:
    with pytest.raises(ApiError) as caught:
        resolved(client, asked, served_name)
    return caught.value


@pytest.mark.parametrize("asked", ["a", "A", "Org/Some-Model", "org/some-model", "SOME-MODEL", "first", "second"])
def test_every_name_of_a_model(asked: str) -> None:
    client = Script(a=None, b=None)
    client.configs = {"a": {"checkpoint": "Org/Some-Model", "aliases": "first, Second,,"}}
    assert resolved(client, asked) == "a"


def test_a_path_is_no_name() -> None:
    client = Script(a=None)
    client.configs = {"a": {"checkpoint": "/srv/models/secret"}}
    error = refused(client, "secret")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


def test_a_directory_wins_over_an_alias_and_a_ready_model_over_one_that_is_not() -> None:
    client = Script(a=None, b=NO_CHECKPOINT, c=None)
    client.configs = {"a": {"aliases": "c"}, "b": {"aliases": "shared"}, "c": {"aliases": "shared"}}
    assert resolved(client, "c") == "c"
    assert resolved(client, "shared") == "c"


@pytest.mark.parametrize("asked", [None, "default", "Default", "served", "SERVED"])
def test_no_name_means_the_only_one_that_is_ready(asked: str | None) -> None:
    assert resolved(Script(a=None, b=NO_CHECKPOINT), asked, "served") == "a"


@pytest.mark.parametrize("asked", [None, "default", "served"])
def test_no_name_is_ambiguous_with_several(asked: str | None) -> None:
    error = refused(Script(a=None, b=None, c=NO_CHECKPOINT), asked, "served")
    assert (error.status, error.param) == (400, "model")
    assert error.message == "model is required, as several are served: a, b"


def test_a_model_that_is_really_called_default() -> None:
    assert resolved(Script(a=None, default=None), "default") == "default"


def test_the_only_model_tells_why_it_is_not_ready() -> None:
    error = refused(Script(b=NO_CHECKPOINT), None)
    assert (error.status, error.message, error.code) == (503, NO_CHECKPOINT.message, "model_not_ready")
    assert refused(Script(b=NO_CHECKPOINT, c=NO_CHECKPOINT), None).message == "No model is ready"


def test_an_unknown_name_lists_what_is_served() -> None:
    error = refused(Script(a=None, b=NO_CHECKPOINT, c=None), "gpt-4" * 100)
    assert error.status == 404
    assert error.message.endswith("does not exist. Ready to be asked: a, c")
    assert len(error.message) < 300
    assert refused(Script(a=None), "x", served_name="mine").message.endswith("Ready to be asked: mine")


@pytest.mark.parametrize(
    ("answer", "state", "reason", "broken"),
    [
        (NO_CHECKPOINT, "READY", NO_CHECKPOINT.message, False),
        (ApiError(500, "Model 'b' failed to answer"), "READY", "Model 'b' failed to answer", True),
        (b"{}", "READY", "Model 'b' does not describe itself as this gateway expects", True),
        (b"garbage", "READY", "Model 'b' does not describe itself as this gateway expects", True),
        (ApiError(504, "No answer within 2 s"), "READY", "No answer within 2 s", True),
        (None, "LOADING", "Model 'b' is loading", False),
        (None, "UNLOADING", "Model 'b' is being unloaded", False),
        (None, "UNAVAILABLE", "Model 'b' is not loaded, see Triton's log", False),
        (None, "", "Model 'b' is not loaded", False),
    ],
)
def test_why_a_model_is_not_ready(answer: ApiError | bytes | None, state: str, reason: str, broken: bool) -> None:
    client = Script(b=answer)
    client.states = {"b": state}

    async def use(registry: Registry) -> tuple[str, bool, bool]:
        card = await registry.find("b")
        return card.reason, card.broken, card.info is None

    assert with_registry(client, use) == (reason, broken, True)
    assert refused(client, "b").message == reason


@pytest.mark.parametrize("status", [429, 504])
def test_busy_is_not_gone(status: int) -> None:
    client = Script(a=None)

    async def use(registry: Registry) -> str:
        client.models["a"] = ApiError(status, "busy")
        await registry.refresh()
        return (await registry.resolve("a")).name

    assert with_registry(client, use) == "a"


def test_an_outage_is_told_at_once_and_over_at_once() -> None:
    client = Script(a=None)

    async def use(registry: Registry) -> None:
        client.down = UNREACHABLE
        await registry.refresh()
        for asked in ("a", "unheard-of", None):
            with pytest.raises(ApiError) as caught:
                await registry.resolve(asked)
            assert (caught.value.status, caught.value.message) == (503, UNREACHABLE.message)
        assert [(card.reason, card.broken) for card in registry.cards] == [(UNREACHABLE.message, True)]
        client.down = None
        assert (await registry.resolve("a")).name == "a"

    with_registry(client, use)


def test_a_triton_that_is_slow_to_answer_keeps_its_models() -> None:
    client = Script(a=None)

    async def use(registry: Registry) -> str:
        client.down = ApiError(504, "No answer within 2 s")
        await registry.refresh()
        return (await registry.resolve("a")).name

    assert with_registry(client, use) == "a"


def test_a_new_model_is_found_when_it_is_asked_for() -> None:
    client = Script(a=None)

    async def use(registry: Registry) -> str:
        client.models["late"] = None
        return (await registry.resolve("late")).name

    assert with_registry(client, use) == "late"


def test_a_model_that_is_gone_is_forgotten() -> None:
    client = Script(a=None, b=None)

    async def use(registry: Registry) -> list[str]:
        del client.models["b"]
        await registry.refresh()
        return [card.name for card in registry.cards]

    assert with_registry(client, use) == ["a"]


def test_looking_again_asks_for_info_only_and_once_for_many_callers() -> None:
    client = Script(a=None)

    async def use(registry: Registry) -> list[str]:
        client.asked.clear()
        await asyncio.gather(*(registry.refresh() for _ in range(20)))
        return client.asked

    assert with_registry(client, use) == ["index", "info a"]


def test_unknown_names_do_not_flood_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "REFRESH_GAP_SECONDS", 60.0)
    client = Script(a=None)

    async def use(registry: Registry) -> int:
        for _ in range(20):
            with pytest.raises(ApiError, match="does not exist"):
                await registry.resolve("b")
        return client.asked.count("index")

    assert with_registry(client, use) == 1


def test_a_suspicion_does_not_wait_for_the_interval() -> None:
    client = Script(a=None)

    async def use(registry: Registry) -> float:
        client.models["a"] = ApiError(500, "Model 'a' failed to answer")
        began = time.monotonic()
        registry.suspect()
        while registry.ready:
            assert time.monotonic() - began < 5  # the interval is 60
            await asyncio.sleep(0.01)
        return time.monotonic() - began

    assert with_registry(client, use) < 5


def test_the_served_name_is_shown_only_when_it_is_clear() -> None:
    async def names(registry: Registry) -> list[str]:
        return [registry.public_name(card) for card in registry.cards]

    assert with_registry(Script(a=None, b=NO_CHECKPOINT), names, "mine") == ["mine", "b"]
    assert with_registry(Script(a=None, b=None), names, "mine") == ["a", "b"]
    assert with_registry(Script(a=None), names) == ["a"]


def test_a_models_directory_is_its_name_whatever_it_says() -> None:
    said = orjson.dumps({**INFO.model_dump(), "name": "somebody-else"})
    assert resolved(Script(a=said), "a") == "a"


def real(target: str, use: Callable[[Registry], Awaitable[T]]) -> T:
    async def run() -> T:
        client = TritonClient(target)
        registry = Registry(client, interval=0.2)
        try:
            await registry.start()
            return await use(registry)
        finally:
            await registry.stop()
            await client.close()

    return asyncio.run(run())


def test_what_a_real_triton_serves(triton: Triton) -> None:
    async def use(registry: Registry) -> None:
        minilm = await registry.resolve("all-minilm-l6-v2")
        assert (minilm.name, minilm.dimensions, minilm.max_model_len, minilm.pooling) == ("minilm", 384, 256, "mean")
        assert minilm.checkpoint == "sentence-transformers/all-MiniLM-L6-v2"
        tiny = await registry.resolve("baai/BGE-tiny")
        assert (tiny.name, tiny.dimensions, tiny.matryoshka) == ("bge_tiny", 60, [20, 40])
        assert tiny.checkpoint is None
        bge = await registry.find("BAAI/bge-base-en-v1.5")
        assert (bge.name, bge.info, bge.broken) == ("bge", None, False)
        assert bge.reason.startswith("Model 'bge' has no checkpoint. Fetch it with: ")
        assert "\n" not in bge.reason

    real(triton.grpc, use)


def test_no_triton_at_all() -> None:
    async def use(registry: Registry) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await registry.resolve(None)
        return caught.value

    assert real(f"127.0.0.1:{free_port()}", use).message == UNREACHABLE.message
