"""The gateway's settings and their defaults, read from `TRITON_EMBED_*` environment variables."""

import json
import os
from typing import Any, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "TRITON_EMBED_"
_HOST = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?"
_ORIGIN = r"[A-Za-z][A-Za-z0-9+.-]*://[^\s,/*?#]+"  # as browsers send it: scheme, host and port, no path


class SettingsError(ValueError):
    """A setting with a bad value. The message names the setting and is for the operator."""


class Settings(BaseSettings):
    """Settings of one gateway. Times are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(30000, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    log_format: Literal["text", "json"] = "text"  # json: also a line per request
    workers: int = Field(1, ge=1, le=64)  # processes that share the port
    # Time for requests in flight to finish when stopping. With tritonserver's own stop, the total is under ten seconds.
    drain_seconds: float = Field(4.0, gt=0, allow_inf_nan=False)

    # Time that models may load without a line in Triton's log, before the processes of those still loading are ended.
    load_timeout: float = Field(600.0, gt=0, allow_inf_nan=False)

    triton_grpc: str = Field("127.0.0.1:8001", pattern=r"^[^\s/]+:\d+$")
    # "key=value", if tritonserver was started with --grpc-restricted-protocol=model-repository:key=value
    triton_repository_header: str = Field("", pattern=r"^([^\s=]+=\S+)?$")
    # "host:port" of Triton's Prometheus metrics, which are added to ours; empty: not added
    triton_metrics: str = Field("", pattern=r"^([^\s/]+:\d+)?$")
    served_model_name: str = ""
    api_key: SecretStr = SecretStr("")  # one key or several, comma-separated; empty: no key needed
    # origins whose pages may read responses (CORS), comma-separated, or "*" for any; empty: none
    cors_origins: str = Field("", pattern=rf"^(\*|{_ORIGIN}(\s*,\s*{_ORIGIN})*)?$")
    # an OTLP/HTTP collector that gets spans, such as http://localhost:4318; empty: no tracing
    otlp_endpoint: str = Field("", pattern=r"^(https?://[^\s/]+(/\S*)?)?$")

    max_inputs: int = Field(2048, ge=1, le=2048)  # not above the max_batch_size of any config.pbtxt
    max_request_tokens: int = Field(300_000, ge=1)
    max_body_bytes: int = Field(32 * 2**20, ge=1)
    max_pending_body_bytes: int = Field(512 * 2**20, ge=1)  # bodies of all requests that are being answered
    max_waiting_tokens: int = Field(1_000_000, ge=1)  # beyond this, new requests are refused
    body_timeout: float = Field(30.0, gt=0, allow_inf_nan=False)  # for the whole body of a request to arrive
    request_timeout: float = Field(60.0, gt=0, allow_inf_nan=False)
    max_request_timeout: float = Field(600.0, gt=0, allow_inf_nan=False)  # limit of x-request-timeout
    refresh_interval: float = Field(2.0, gt=0, allow_inf_nan=False)
    # tiktoken's own variable: the directory of its tables, for requests with OpenAI's token ids
    tiktoken_cache_dir: str = Field("", validation_alias=AliasChoices("tiktoken_cache_dir", "TIKTOKEN_CACHE_DIR"))

    media_urls: bool = True  # whether image URLs are fetched
    # "host" or "host:port", comma-separated: only these may have addresses that are not public
    media_allowed_hosts: str = Field("", pattern=rf"^({_HOST}(\s*,\s*{_HOST})*)?$")

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, value: str) -> str:
        """Accept an IPv6 address as it stands in a URL."""
        return value[1:-1] if value.startswith("[") and value.endswith("]") else value

    @field_validator("api_key")
    @classmethod
    def _no_key_is_empty(cls, value: SecretStr) -> SecretStr:
        """Refuse empty keys: a stray comma or blanks must not open the gateway."""
        keys = value.get_secret_value()
        if keys and not all(key.strip() for key in keys.split(",")):
            raise ValueError("one of the keys is empty")
        return value

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of `api_key`."""
        return tuple(filter(None, (key.strip() for key in self.api_key.get_secret_value().split(","))))

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins of `cors_origins`, in lower case as browsers send them."""
        return tuple(filter(None, (origin.strip().lower() for origin in self.cors_origins.split(","))))

    @property
    def allowed_hosts(self) -> frozenset[str]:
        """The hosts of `media_allowed_hosts`, in lower case."""
        return frozenset(filter(None, (host.strip().lower() for host in self.media_allowed_hosts.split(","))))


def read_settings(**overrides: Any) -> Settings:
    """Read settings from the environment. `overrides`, such as command-line flags, take precedence.

    Raises:
        SettingsError: if a value has the wrong type or range, or an override is not a setting.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        messages = [f"{_spelling(item['loc'], overrides)}: {item['msg']}" for item in error.errors()]
        raise SettingsError("; ".join(messages)) from None


def dump_settings(settings: Settings) -> bytes:
    """Return every setting as JSON, with API keys: the input of `read_settings(**json.loads(...))`."""
    values = {name: value.get_secret_value() if isinstance(value, SecretStr) else value for name, value in settings}
    return json.dumps(values).encode()


def environment(**added: str) -> dict[str, str]:
    """Return this process's environment with additions, for a child process."""
    return {**os.environ, **added}


def _spelling(location: tuple[int | str, ...], overrides: dict[str, Any]) -> str:
    """Return the name of a setting as the operator wrote it."""
    name = ".".join(map(str, location))
    return name if name in overrides else f"{PREFIX}{name.upper()}"
