"""textgen_serve/server.py: what tritonserver is started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from textgen_serve.runtime import Runtime
from textgen_serve.server import Ports, ServerOptions, command_of


@pytest.mark.parametrize(("others", "is_complete"), [((), True), (("resnet",), False)])
def test_models_are_asked_for_more_configuration_where_one_is_not_ours(
    others: tuple[str, ...], is_complete: bool, tmp_path: Path
) -> None:
    for name in ("ensemble", "textgen", "tokenizer", *others):
        (tmp_path / name / "1").mkdir(parents=True)
    (tmp_path / "README.md").touch()
    options = ServerOptions(tmp_path, "127.0.0.1", Ports(1, 2, 3), 90, tmp_path / "log", "key")
    command = command_of(Runtime(Path("tritonserver"), None, {}), options, "prefix")
    assert ("--disable-auto-complete-config" in command) == is_complete
