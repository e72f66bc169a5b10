"""The model registry: names, states and refreshes, against a scripted Triton and a real one."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import pytest
from test_model_info import INFO

from conftest import Triton, free_port
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.triton import registry as registry_module
from triton_embed.gateway.triton.client import IndexEntry, TritonClient
from triton_embed.gateway.triton.registry import Registry

T = TypeVar("T")


class ScriptedTriton(TritonClient):
    """A Triton with scripted replies: `models` maps a name to its INFO, an error, or None for test_model's INFO."""

    def __init__(self, **models: ApiError | bytes | None) -> None:
        self.models: dict[str, ApiError | bytes | None] = models
        self.states: dict[str, str] = {}
        self.configs: dict[str, dict[str, str]] = {}
        self.down: ApiError | None = None
        self.calls: list[str] = []

    async def index(self) -> list[IndexEntry]:
        self.calls.append("index")
        if self.down is not None:
            raise self.down
        return [IndexEntry(name, "1", self.states.get(name, "READY")) for name in self.models]

    async def config(self, model: str) -> dict[str, str]:
        self.calls.append(f"config {model}")
        return self.configs.get(model, {})

    async def info(self, model: str) -> bytes:
        self.calls.append(f"info {model}")
        reply = self.models[model]
        if isinstance(reply, ApiError):
            raise reply
        return INFO.to_json().encode() if reply is None else reply


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


def resolve(client: TritonClient, name: str | None, served_name: str = "") -> str:
    async def use(registry: Registry) -> str:
        return (await registry.resolve(name)).name

    return with_registry(client, use, served_name)


def resolve_error(client: TritonClient, name: str | None, served_name: str = "") -> ApiError:
    with pytest.raises(ApiError) as caught:
        resolve(client, name, served_name)
    return caught.value


@pytest.mark.parametrize(
    "name",
    [
        *("a", "A", "Org/Some-Model", "org/some-model", "SOME-MODEL", "first", "second"),
        *("openai/a", "OpenAI/Org/Some-Model", "a:latest", "openai/first:latest"),
    ],
)
def test_every_name_resolves_to_its_model(name: str) -> None:
    client = ScriptedTriton(a=None, b=None)
    client.configs = {"a": {"checkpoint": "Org/Some-Model", "aliases": "first, Second,,"}}
    assert resolve(client, name) == "a"


def test_model_named_like_a_spelling_beats_the_spelling() -> None:
    client = ScriptedTriton(a=None, b=None)
    client.configs = {"a": {"aliases": "clip"}, "b": {"aliases": "openai/clip, clip:latest"}}
    assert [resolve(client, name) for name in ("clip", "openai/clip", "clip:latest")] == ["a", "b", "b"]
    assert resolve_error(client, "azure/clip").status == 404


def test_checkpoint_path_is_not_a_name() -> None:
    client = ScriptedTriton(a=None)
    client.configs = {"a": {"checkpoint": "/srv/models/secret"}}
    error = resolve_error(client, "secret")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


def test_directory_beats_alias_and_ready_model_beats_unready() -> None:
    client = ScriptedTriton(a=None, b=NO_CHECKPOINT, c=None)
    client.configs = {"a": {"aliases": "c"}, "b": {"aliases": "shared"}, "c": {"aliases": "shared"}}
    assert resolve(client, "c") == "c"
    assert resolve(client, "shared") == "c"


@pytest.mark.parametrize("name", [None, "default", "Default", "served", "SERVED"])
def test_no_name_resolves_to_the_only_ready_model(name: str | None) -> None:
    assert resolve(ScriptedTriton(a=None, b=NO_CHECKPOINT), name, "served") == "a"


@pytest.mark.parametrize("name", [None, "default", "served"])
def test_no_name_is_rejected_if_several_models_are_ready(name: str | None) -> None:
    error = resolve_error(ScriptedTriton(a=None, b=None, c=NO_CHECKPOINT), name, "served")
    assert (error.status, error.param) == (400, "model")
    assert error.message == "model is required because several are served: a, b"


def test_model_named_default_is_resolved() -> None:
    assert resolve(ScriptedTriton(a=None, default=None), "default") == "default"


def test_error_says_why_the_only_model_is_not_ready() -> None:
    error = resolve_error(ScriptedTriton(b=NO_CHECKPOINT), None)
    assert (error.status, error.message, error.code) == (503, NO_CHECKPOINT.message, "model_not_ready")
    assert resolve_error(ScriptedTriton(b=NO_CHECKPOINT, c=NO_CHECKPOINT), None).message == "No model is ready"


def test_unknown_name_lists_available_models() -> None:
    error = resolve_error(ScriptedTriton(a=None, b=NO_CHECKPOINT, c=None), "gpt-4" * 100)
    assert error.status == 404
    assert error.message.endswith("does not exist. Available models: a, c")
    assert len(error.message) < 300
    assert resolve_error(ScriptedTriton(a=None), "x", served_name="mine").message.endswith("Available models: mine")


@pytest.mark.parametrize(
    ("reply", "state", "reason", "broken"),
    [
        (NO_CHECKPOINT, "READY", NO_CHECKPOINT.message, False),
        (ApiError(500, "Model 'b' failed to answer"), "READY", "Model 'b' failed to answer", True),
        (b"{}", "READY", "Model 'b' returned an INFO output that this gateway cannot read", True),
        (b"garbage", "READY", "Model 'b' returned an INFO output that this gateway cannot read", True),
        (ApiError(504, "No answer within 2 s"), "READY", "No answer within 2 s", True),
        (None, "LOADING", "Model 'b' is loading", False),
        (None, "UNLOADING", "Model 'b' is being unloaded", False),
        (None, "UNAVAILABLE", "Model 'b' is not loaded, see Triton's log", False),
        (None, "", "Model 'b' is not loaded", False),
    ],
)
def test_reason_of_an_unready_model(reply: ApiError | bytes | None, state: str, reason: str, broken: bool) -> None:
    client = ScriptedTriton(b=reply)
    client.states = {"b": state}

    async def use(registry: Registry) -> tuple[str, bool, bool]:
        entry = await registry.find("b")
        return entry.reason, entry.broken, entry.info is None

    assert with_registry(client, use) == (reason, broken, True)
    assert resolve_error(client, "b").message == reason


@pytest.mark.parametrize("status", [429, 504])
def test_busy_model_stays_ready(status: int) -> None:
    client = ScriptedTriton(a=None)

    async def use(registry: Registry) -> str:
        client.models["a"] = ApiError(status, "busy")
        await registry.refresh()
        return (await registry.resolve("a")).name

    assert with_registry(client, use) == "a"


def test_outage_is_reported_and_recovers_immediately() -> None:
    client = ScriptedTriton(a=None)

    async def use(registry: Registry) -> None:
        client.down = UNREACHABLE
        await registry.refresh()
        for name in ("a", "unknown", None):
            with pytest.raises(ApiError) as caught:
                await registry.resolve(name)
            assert (caught.value.status, caught.value.message) == (503, UNREACHABLE.message)
        assert [(entry.reason, entry.broken) for entry in registry.entries] == [(UNREACHABLE.message, True)]
        client.down = None
        assert (await registry.resolve("a")).name == "a"

    with_registry(client, use)


def test_slow_index_keeps_the_models() -> None:
    client = ScriptedTriton(a=None)

    async def use(registry: Registry) -> str:
        client.down = ApiError(504, "No answer within 2 s")
        await registry.refresh()
        return (await registry.resolve("a")).name

    assert with_registry(client, use) == "a"


def test_new_model_is_found_on_a_miss() -> None:
    client = ScriptedTriton(a=None)

    async def use(registry: Registry) -> str:
        client.models["late"] = None
        return (await registry.resolve("late")).name

    assert with_registry(client, use) == "late"


def test_removed_model_is_dropped() -> None:
    client = ScriptedTriton(a=None, b=None)

    async def use(registry: Registry) -> list[str]:
        del client.models["b"]
        await registry.refresh()
        return [entry.name for entry in registry.entries]

    assert with_registry(client, use) == ["a"]


def test_concurrent_refreshes_share_one_call_and_skip_config() -> None:
    client = ScriptedTriton(a=None)

    async def use(registry: Registry) -> list[str]:
        client.calls.clear()
        await asyncio.gather(*(registry.refresh() for _ in range(20)))
        return client.calls

    assert with_registry(client, use) == ["index", "info a"]


def test_unknown_names_refresh_at_most_once_per_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "REFRESH_GAP_SECONDS", 60.0)
    client = ScriptedTriton(a=None)

    async def use(registry: Registry) -> int:
        for _ in range(20):
            with pytest.raises(ApiError, match="does not exist"):
                await registry.resolve("b")
        return client.calls.count("index")

    assert with_registry(client, use) == 1


def test_refresh_soon_does_not_wait_for_the_interval() -> None:
    client = ScriptedTriton(a=None)

    async def use(registry: Registry) -> float:
        client.models["a"] = ApiError(500, "Model 'a' failed to answer")
        start = time.monotonic()
        registry.refresh_soon()
        while registry.ready:
            assert time.monotonic() - start < 5  # the interval is 60
            await asyncio.sleep(0.01)
        return time.monotonic() - start

    assert with_registry(client, use) < 5


def test_served_name_is_public_only_for_a_single_ready_model() -> None:
    async def public_names(registry: Registry) -> list[str]:
        return [registry.public_name(entry) for entry in registry.entries]

    assert with_registry(ScriptedTriton(a=None, b=NO_CHECKPOINT), public_names, "mine") == ["mine", "b"]
    assert with_registry(ScriptedTriton(a=None, b=None), public_names, "mine") == ["a", "b"]
    assert with_registry(ScriptedTriton(a=None), public_names) == ["a"]


def test_directory_overrides_the_name_in_info() -> None:
    info = replace(INFO, name="other").to_json().encode()
    assert resolve(ScriptedTriton(a=info), "a") == "a"


def with_real_triton(target: str, use: Callable[[Registry], Awaitable[T]]) -> T:
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


def test_models_of_a_real_triton(triton: Triton) -> None:
    async def use(registry: Registry) -> None:
        minilm = await registry.resolve("all-minilm-l6-v2")
        assert (minilm.name, minilm.dimensions, minilm.max_model_len, minilm.pooling) == ("minilm", 384, 256, "mean")
        assert minilm.checkpoint == "sentence-transformers/all-MiniLM-L6-v2"
        tiny = await registry.resolve("baai/BGE-tiny")
        assert (tiny.name, tiny.dimensions, tiny.matryoshka) == ("bge_tiny", 60, (20, 40))
        assert tiny.checkpoint is None
        bge = await registry.find("BAAI/bge-base-en-v1.5")
        assert (bge.name, bge.info, bge.broken) == ("bge", None, False)
        assert bge.reason.startswith("Model 'bge' has no checkpoint. Fetch it with: ")
        assert "\n" not in bge.reason

    with_real_triton(triton.grpc, use)


def test_unreachable_triton_is_reported() -> None:
    async def use(registry: Registry) -> ApiError:
        with pytest.raises(ApiError) as caught:
            await registry.resolve(None)
        return caught.value

    assert with_real_triton(f"127.0.0.1:{free_port()}", use).message == UNREACHABLE.message
