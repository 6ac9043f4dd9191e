"""The page at /chat: one file, shown as it is."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

# The page loads nothing from elsewhere, and may not: a model's text is shown in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


@router.get("/chat")
async def chat_page() -> HTMLResponse:
    """A conversation with the model in the browser."""
    page = resources.files("textgen_client.gateway").joinpath("chat.html").read_text(encoding="utf-8")
    return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})
