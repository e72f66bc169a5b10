"""The web page at `/` and Swagger UI at `/docs`, served without a CDN.

Both use relative URLs, so that they work behind a proxy that adds a path prefix.
"""

import re
from base64 import b64encode
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Final

import fastapi_offline
from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import Response

router = APIRouter(include_in_schema=False)

# Inline in the pages: a browser would otherwise request /favicon.ico.
ICON: Final = (
    "data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22 viewBox=%220 0 16 16%22%3E%3Crect width=%2216"
    "%22 height=%2216%22 rx=%224%22 fill=%22%230b5a7a%22/%3E%3Cg fill=%22%23fff%22%3E%3Ccircle cx=%225%22 cy=%2211"
    "%22 r=%221.7%22/%3E%3Ccircle cx=%228.3%22 cy=%229.4%22 r=%221.7%22/%3E%3Ccircle cx=%2211%22 cy=%224.6%22 r=%221"
    ".7%22/%3E%3C/g%3E%3C/svg%3E"
)
REVALIDATE: Final = "no-cache"  # a page must match the assets and the API of this version
ONE_DAY: Final = "public, max-age=86400"


class StaticFile:
    """A file that does not change while the process lives, with an ETag.

    Args:
        caching: The Cache-Control header.
        policy: The Content-Security-Policy: what a page may load, and from where.
    """

    def __init__(self, body: bytes, media_type: str, caching: str, policy: str = "default-src 'none'") -> None:
        self._body = body
        self._media_type = media_type
        self._tag = f'"{sha256(body).hexdigest()[:32]}"'
        self._headers = {
            "ETag": self._tag,
            "Cache-Control": caching,
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }

    def response(self, request: Request) -> Response:
        """Return a 200 with the file, or a 304 to a browser that has it."""
        if self._tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers=self._headers, media_type=self._media_type)


def content_policy(html: str, **sources: str) -> str:
    """Return a Content-Security-Policy that allows exactly the inline scripts and styles of `html`.

    Args:
        sources: Further sources by kind: `img="data:"`.
    """
    allowed = {kind: [source] for kind, source in sources.items()}
    for tag in ("script", "style"):
        for text in re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL):
            digest = b64encode(sha256(text.encode()).digest()).decode()
            allowed.setdefault(tag, []).append(f"'sha256-{digest}'")
    rules = [f"{kind}-src {' '.join(values)}" for kind, values in allowed.items()]
    denied = [f"{name} 'none'" for name in ("default-src", "base-uri", "form-action", "frame-ancestors")]
    return "; ".join([*denied, "connect-src 'self'", *rules])


def _page() -> StaticFile:
    html = Path(__file__).with_name("page.html").read_text("utf-8").replace("$ICON", ICON)
    return StaticFile(html.encode(), "text/html", REVALIDATE, content_policy(html, img="data:"))


def _docs() -> StaticFile:
    response = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="triton-embed: the API",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url=ICON,
    )
    html = bytes(response.body).decode()
    policy = content_policy(html, script="'self'", style="'self'", img="data:")
    return StaticFile(bytes(response.body), "text/html", REVALIDATE, policy)


def _asset(name: str, media_type: str) -> StaticFile:
    return StaticFile((resources.files(fastapi_offline) / "static" / name).read_bytes(), media_type, ONE_DAY)


# Read once when the gateway starts.
PAGE: Final = _page()
DOCS: Final = _docs()
SCRIPT: Final = _asset("swagger-ui-bundle.js", "text/javascript")
STYLE: Final = _asset("swagger-ui.css", "text/css")


@router.get("/")
async def page(request: Request) -> Response:
    return PAGE.response(request)


@router.get("/docs")
async def docs(request: Request) -> Response:
    return DOCS.response(request)


@router.get("/docs/swagger-ui-bundle.js")
async def docs_script(request: Request) -> Response:
    return SCRIPT.response(request)


@router.get("/docs/swagger-ui.css")
async def docs_style(request: Request) -> Response:
    return STYLE.response(request)
