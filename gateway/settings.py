"""The one place for the gateway's defaults: `TRITON_EMBED_*` environment variables become frozen settings."""

from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "TRITON_EMBED_"
_HOST = r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?"


class SettingsError(ValueError):
    """A setting has a bad value. The message names the setting and is meant for the operator."""


class Settings(BaseSettings):
    """How this gateway listens, what it lets through and where Triton is. Times in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(30000, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"

    triton_grpc: str = Field("127.0.0.1:8001", pattern=r"^[^\s/]+:\d+$")
    # "key=value" of a tritonserver started with --grpc-restricted-protocol=model-repository:key=value
    triton_repository_header: str = Field("", pattern=r"^([^\s=]+=\S+)?$")
    served_model_name: str = ""
    api_key: SecretStr = SecretStr("")  # empty: open to everyone who can connect

    max_inputs: int = Field(2048, ge=1, le=2048)  # the max_batch_size of every config.pbtxt
    max_request_tokens: int = Field(300_000, ge=1)
    max_body_bytes: int = Field(32 * 2**20, ge=1)
    request_timeout: float = Field(60.0, gt=0, allow_inf_nan=False)
    refresh_interval: float = Field(2.0, gt=0, allow_inf_nan=False)

    media_urls: bool = True  # whether images named by http(s) URLs are fetched
    # "host" or "host:port", comma-separated: these alone may have addresses that are not public
    media_allowed_hosts: str = Field("", pattern=rf"^({_HOST}(\s*,\s*{_HOST})*)?$")

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


def _spelling(location: tuple[int | str, ...], overrides: dict[str, Any]) -> str:
    """The setting as the operator wrote it."""
    name = ".".join(map(str, location))
    return name if name in overrides else f"{PREFIX}{name.upper()}"
