"""The page at `/`: files beside the code, served as they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .errors import Forbidden, envelope, status_of
from .guard import check_origin
from .state.ids import new_id

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # Nothing but files of this server: no inline script or style, no foreign anything, in no other page's frame.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


def routes(*, is_local: bool) -> list[Route]:
    """`/` and one route for each file."""
    names = sorted(path.name for path in FOLDER.iterdir() if path.suffix in TYPES)
    paths = {f"/page/{name}": name for name in names if name != "index.html"}
    return [
        Route(path, _serve(name, is_local=is_local), methods=["GET"])
        for path, name in {"/": "index.html", **paths}.items()
    ]


def _serve(name: str, *, is_local: bool) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        try:
            check_origin(request, is_local=is_local)
        except Forbidden as error:
            return JSONResponse(envelope(error, new_id("req")), status_code=status_of(error))
        file = FOLDER / name
        return Response(file.read_bytes(), media_type=TYPES[file.suffix], headers=HEADERS)

    return serve
