"""How a process's log lines look: text, or one JSON object a line. Knows nothing of what is logged.

A record may carry facts: `logger.info("request", extra={"facts": {...}})`. In text they follow the message as
name=value, in JSON they are fields of the line.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

_PLAIN = re.compile(r"[\w.:/-]+")


def configure_logging(level: str, *, as_json: bool, source: str) -> None:
    """Set up the root logger of this process, on standard error. level: debug, info, warning or error. source: which
    process speaks."""
    handler = logging.StreamHandler()
    handler.setFormatter(_json_formatter(source) if as_json else _TextFormatter(source))
    logging.basicConfig(level=level.upper(), handlers=[handler])


class _TextFormatter(logging.Formatter):
    def __init__(self, source: str) -> None:
        super().__init__(f"{source}: %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        return " ".join([super().formatMessage(record), *(f"{name}={_text(value)}" for name, value in facts.items())])


def _text(value: Any) -> str:
    """A value in a line of text; what could be taken for more than one value, or more than one line, is quoted."""
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _json_formatter(source: str) -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    class Formatter(JsonFormatter):
        def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
            super().add_fields(log_data, record, message_dict)
            log_data.update(log_data.pop("facts", {}))

    return Formatter(
        "%(asctime)s %(levelname)s %(name)s %(message)s",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        static_fields={"source": source},
        json_ensure_ascii=False,
    )
