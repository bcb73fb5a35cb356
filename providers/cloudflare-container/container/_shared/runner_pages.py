"""What a proxy says in the control plane's place is an error of the connection, and no answer.

A captive portal, a load balancer's notice or a login page come as 200 with text in them; a proxy that gives up in the
middle leaves half an object, or none. The SDK hands a text on in the place of an object, and fails on the others with
an error that names nothing; neither is an `anthropic.APIError`, which every caller of ours expects.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from anthropic import APIConnectionError, APIRequest, AsyncAPIResponse, Middleware

_TEXTS = ("text/html", "text/plain", "application/xhtml")


class RefusePages(Middleware):
    """Raises `APIConnectionError` for an answer that is a page, or half an answer."""

    async def handle_async(
        self, request: APIRequest, call_next: Callable[[Any], Awaitable[AsyncAPIResponse[Any]]]
    ) -> Any:
        response = await call_next(request)
        if response.status_code != 200:
            return response
        kind = response.headers.get("content-type", "")
        if kind.startswith(_TEXTS):
            raise APIConnectionError(message="a page came instead of an answer", request=response.http_request)
        if kind.startswith("application/json") and not request.stream:
            try:
                json.loads(await response.http_response.aread())
            except ValueError:
                error = APIConnectionError(message="half an answer came, or none", request=response.http_request)
                raise error from None
        return response
