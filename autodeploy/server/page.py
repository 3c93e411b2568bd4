"""GET /: the page a person opens. One file, `page.html`, and headers that let it do nothing else.

Its own style and script are allowed by their hashes; nothing else runs, and it can talk to this
server only. So even text of a model that looks like HTML could do nothing, were it ever shown as
such; the page shows it as text.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Response

PAGE = Path(__file__).with_name("page.html")
_BLOCK = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


def content_policy(page: str) -> str:
    """The Content-Security-Policy under which exactly this page works."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}
    for kind, content in _BLOCK.findall(page):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join([
        "default-src 'none'",
        f"script-src {' '.join(hashes['script'])}",
        f"style-src {' '.join(hashes['style'])}",
        "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'",
        "frame-ancestors 'none'",
    ])  # fmt: skip


def page_router() -> APIRouter:
    """GET /. The file is read once."""
    router = APIRouter()
    text = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_policy(text),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(text, media_type="text/html; charset=utf-8", headers=headers)

    return router
