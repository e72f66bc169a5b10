"""Settings from the environment and overrides; errors name a setting as the operator wrote it."""

import json

import pytest
from pydantic import ValidationError

from triton_embed.gateway.settings import Settings, SettingsError, dump_settings, environment, read_settings


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"TRITON_EMBED_{name.upper()}", raising=False)


def test_defaults() -> None:
    settings = read_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 30000)
    assert settings.triton_grpc == "127.0.0.1:8001"
    assert (settings.max_inputs, settings.max_request_tokens) == (2048, 300_000)
    assert settings.max_body_bytes == 32 * 1024 * 1024
    assert (settings.request_timeout, settings.refresh_interval) == (60.0, 2.0)
    assert settings.api_key.get_secret_value() == ""
    assert (settings.media_urls, settings.allowed_hosts) == (True, frozenset())
    assert (settings.keys, settings.origins) == ((), ())
    assert (settings.log_format, settings.workers, settings.drain_seconds) == ("text", 1, 4.0)
    assert (settings.triton_metrics, settings.otlp_endpoint) == ("", "")
    assert (settings.max_waiting_tokens, settings.max_request_timeout) == (1_000_000, 600.0)
    assert settings.body_timeout == 30.0


def test_overrides_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_EMBED_PORT", "8080")
    monkeypatch.setenv("TRITON_EMBED_HOST", "0.0.0.0")
    settings = read_settings(port=9090)
    assert (settings.host, settings.port) == ("0.0.0.0", 9090)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "many"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("HOST", ""),
        ("MAX_INPUTS", "0"),
        ("MAX_INPUTS", "2049"),
        ("MAX_REQUEST_TOKENS", "0"),
        ("MAX_BODY_BYTES", "32MiB"),
        ("REQUEST_TIMEOUT", "0"),
        ("REQUEST_TIMEOUT", "nan"),
        ("REFRESH_INTERVAL", "inf"),
        ("BODY_TIMEOUT", "0"),
        ("MAX_REQUEST_TIMEOUT", "0"),
        ("MAX_REQUEST_TIMEOUT", "inf"),
        ("MAX_WAITING_TOKENS", "0"),
        ("DRAIN_SECONDS", "0"),
        ("DRAIN_SECONDS", "-1"),
        ("WORKERS", "0"),
        ("WORKERS", "65"),
        ("WORKERS", "auto"),
        ("LOG_FORMAT", "xml"),
        ("API_KEY", ","),
        ("API_KEY", " "),
        ("API_KEY", "one,,two"),
        ("API_KEY", "one,"),
        ("CORS_ORIGINS", "page.example"),
        ("CORS_ORIGINS", "https://page.example/"),
        ("CORS_ORIGINS", "https://*.example"),
        ("CORS_ORIGINS", "*,https://page.example"),
        ("TRITON_METRICS", "localhost"),
        ("TRITON_METRICS", "http://localhost:8002/metrics"),
        ("OTLP_ENDPOINT", "localhost:4318"),
        ("OTLP_ENDPOINT", "grpc://localhost:4317"),
        ("OTLP_ENDPOINT", "http://"),
        ("TRITON_GRPC", "localhost"),
        ("TRITON_GRPC", "http://localhost:8001"),
        ("TRITON_REPOSITORY_HEADER", "secret"),
        ("LOG_LEVEL", "loud"),
        ("MEDIA_URLS", "perhaps"),
        ("MEDIA_ALLOWED_HOSTS", "http://intranet"),
        ("MEDIA_ALLOWED_HOSTS", "10.0.0.0/8"),
        ("MEDIA_ALLOWED_HOSTS", "intranet,"),
        ("MEDIA_ALLOWED_HOSTS", "me@intranet"),
        ("MEDIA_ALLOWED_HOSTS", "::1"),
        ("MEDIA_ALLOWED_HOSTS", "*"),
    ],
)
def test_error_names_the_environment_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"TRITON_EMBED_{name}", value)
    with pytest.raises(SettingsError, match=f"^TRITON_EMBED_{name}: "):
        read_settings()


def test_media_allowed_hosts_are_split_in_lower_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_EMBED_MEDIA_ALLOWED_HOSTS", "Images.Intranet, 10.1.2.3:8080,[::1]:80")
    assert read_settings().allowed_hosts == {"images.intranet", "10.1.2.3:8080", "[::1]:80"}


def test_keys_and_origins_are_split() -> None:
    settings = read_settings(api_key="one, two ,k€y", cors_origins="https://A.example, http://localhost:3000")
    assert settings.keys == ("one", "two", "k€y")
    assert settings.origins == ("https://a.example", "http://localhost:3000")
    assert read_settings(cors_origins="*").origins == ("*",)


def test_error_does_not_show_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_EMBED_API_KEY", "hunter2,")
    with pytest.raises(SettingsError) as raised:
        read_settings()
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("endpoint", ["http://localhost:4318", "https://c.example/", "http://c:1/v1/traces", ""])
def test_valid_otlp_endpoints(endpoint: str) -> None:
    assert read_settings(otlp_endpoint=endpoint).otlp_endpoint == endpoint


def test_dumped_settings_are_restored_despite_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load dumped settings as a worker does, whose environment may differ."""
    settings = read_settings(port=1, api_key="k€y,other", media_urls=False, drain_seconds=0.5, workers=3, max_inputs=7)
    monkeypatch.setenv("TRITON_EMBED_PORT", "2")
    monkeypatch.setenv("TRITON_EMBED_API_KEY", "another")
    assert read_settings(**json.loads(dump_settings(settings))) == settings


def test_environment_of_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_EMBED_PORT", "2")
    assert environment(ADDED="x").items() >= {"TRITON_EMBED_PORT": "2", "ADDED": "x"}.items()


def test_error_names_the_override() -> None:
    with pytest.raises(SettingsError, match=r"^port: "):
        read_settings(port="many")
    with pytest.raises(SettingsError, match=r"^prot: "):
        read_settings(prot=30000)


def test_all_errors_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_EMBED_PORT", "many")
    monkeypatch.setenv("TRITON_EMBED_LOG_LEVEL", "loud")
    with pytest.raises(SettingsError, match=r"PORT.*; .*LOG_LEVEL"):
        read_settings()


def test_settings_are_frozen_and_hide_the_key() -> None:
    settings = read_settings(api_key="hunter2")
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
    assert "hunter2" not in repr(settings)
