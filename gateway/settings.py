"""The one place for the gateway's defaults: `TRITON_EMBED_*` environment variables become frozen settings."""

import json
import os
from typing import Any, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "TRITON_EMBED_"
_HOST = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?"
_ORIGIN = r"[A-Za-z][A-Za-z0-9+.-]*://[^\s,/*?#]+"  # as browsers send it: scheme, host, port, and no path


class SettingsError(ValueError):
    """A setting has a bad value. The message names the setting and is meant for the operator."""


class Settings(BaseSettings):
    """How this gateway listens, what it lets through and where Triton is. Times in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(30000, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    log_format: Literal["text", "json"] = "text"  # json: also a line for every request answered
    workers: int = Field(1, ge=1, le=64)  # processes that share the port
    # How long requests in flight may go on when stopping. With tritonserver's own stop this is under ten seconds.
    drain_seconds: float = Field(4.0, gt=0, allow_inf_nan=False)

    triton_grpc: str = Field("127.0.0.1:8001", pattern=r"^[^\s/]+:\d+$")
    # "key=value" of a tritonserver started with --grpc-restricted-protocol=model-repository:key=value
    triton_repository_header: str = Field("", pattern=r"^([^\s=]+=\S+)?$")
    # "host:port" where Triton serves its own Prometheus metrics, which join ours; empty: they do not
    triton_metrics: str = Field("", pattern=r"^([^\s/]+:\d+)?$")
    served_model_name: str = ""
    api_key: SecretStr = SecretStr("")  # one key or several, comma-separated; empty: open to all who can connect
    # origins whose pages may read answers, comma-separated, or "*" for any; empty: none
    cors_origins: str = Field("", pattern=rf"^(\*|{_ORIGIN}(\s*,\s*{_ORIGIN})*)?$")
    # an OTLP/HTTP collector, as http://localhost:4318: spans are sent there; empty: none are made
    otlp_endpoint: str = Field("", pattern=r"^(https?://[^\s/]+(/\S*)?)?$")

    max_inputs: int = Field(2048, ge=1, le=2048)  # the max_batch_size of every config.pbtxt
    max_request_tokens: int = Field(300_000, ge=1)
    max_body_bytes: int = Field(32 * 2**20, ge=1)
    max_waiting_tokens: int = Field(1_000_000, ge=1)  # with more waiting in this gateway, new work is refused
    body_timeout: float = Field(30.0, gt=0, allow_inf_nan=False)  # for a request's whole body to arrive
    request_timeout: float = Field(60.0, gt=0, allow_inf_nan=False)
    max_request_timeout: float = Field(600.0, gt=0, allow_inf_nan=False)  # the longest a caller may ask for
    refresh_interval: float = Field(2.0, gt=0, allow_inf_nan=False)
    # tiktoken's own variable: where its tables lie, for callers who send OpenAI's token ids
    tiktoken_cache_dir: str = Field("", validation_alias=AliasChoices("tiktoken_cache_dir", "TIKTOKEN_CACHE_DIR"))

    media_urls: bool = True  # whether images named by http(s) URLs are fetched
    # "host" or "host:port", comma-separated: these alone may have addresses that are not public
    media_allowed_hosts: str = Field("", pattern=rf"^({_HOST}(\s*,\s*{_HOST})*)?$")

    @field_validator("api_key")
    @classmethod
    def _no_key_is_empty(cls, given: SecretStr) -> SecretStr:
        """A stray comma, or blanks, must not open the gateway."""
        stated = given.get_secret_value()
        if stated and not all(key.strip() for key in stated.split(",")):
            raise ValueError("an empty key is among them")
        return given

    @property
    def keys(self) -> tuple[str, ...]:
        """`api_key` one by one."""
        return tuple(filter(None, (key.strip() for key in self.api_key.get_secret_value().split(","))))

    @property
    def origins(self) -> tuple[str, ...]:
        """`cors_origins` one by one, in lower case as browsers send them."""
        return tuple(filter(None, (origin.strip().lower() for origin in self.cors_origins.split(","))))

    @property
    def allowed_hosts(self) -> frozenset[str]:
        """`media_allowed_hosts` one by one, in lower case."""
        return frozenset(filter(None, (host.strip().lower() for host in self.media_allowed_hosts.split(","))))


def read_settings(**overrides: Any) -> Settings:
    """Settings from the environment; `overrides` (command-line flags, say) win over it.

    SettingsError: a value is of the wrong kind or out of range, or an override has no such setting.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        faults = [f"{_spelling(fault['loc'], overrides)}: {fault['msg']}" for fault in error.errors()]
        raise SettingsError("; ".join(faults)) from None


def dump_settings(settings: Settings) -> bytes:
    """JSON of every setting, keys in the clear: `read_settings(**json.loads(it))` is equal."""
    revealed = {name: value.get_secret_value() if isinstance(value, SecretStr) else value for name, value in settings}
    return json.dumps(revealed).encode()


def environment(**added: str) -> dict[str, str]:
    """This process's environment and what is added, for one that it starts."""
    return {**os.environ, **added}


def _spelling(location: tuple[int | str, ...], overrides: dict[str, Any]) -> str:
    """The setting as the operator wrote it."""
    name = ".".join(map(str, location))
    return name if name in overrides else f"{PREFIX}{name.upper()}"
