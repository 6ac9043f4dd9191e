"""The one error of this package."""

from __future__ import annotations


class ServeError(Exception):
    """The server cannot be started, or has died. The text is one line for the user; no traceback belongs to it."""
