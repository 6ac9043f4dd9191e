"""Values of Triton's tensors: what a request's inputs hold, read with messages that name the input; and text to send.

Knows no input by its meaning. An input that is not given is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from textgen_engine.errors import InvalidParameter


def read_flag(request: Any, name: str) -> bool | None:
    """A boolean input. Raises InvalidParameter where it has more or fewer elements than one."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().reshape(-1)
    if len(values) != 1:
        raise InvalidParameter(f"`{name}` must have exactly one element; given: {len(values)}")
    return bool(values[0])


def read_strings(request: Any, name: str) -> list[str] | None:
    """Every element of a text input. Raises InvalidParameter for what is no UTF-8."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    strings = []
    for value in tensor.as_numpy().reshape(-1):
        try:
            strings.append(value.decode() if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError as error:
            raise InvalidParameter(f"`{name}` must be UTF-8 text; byte {error.start} is not") from None
    return strings


def read_text(request: Any, name: str) -> str | None:
    """A text input of one element. Raises InvalidParameter for any other number, and for what is no UTF-8."""
    strings = read_strings(request, name)
    if strings is None:
        return None
    if len(strings) != 1:
        raise InvalidParameter(f"`{name}` must have exactly one element; given: {len(strings)}")
    return strings[0]


def text_tensor(name: str, texts: Sequence[str]) -> Any:
    """A tensor of texts, `[len(texts)]`."""
    return pb_utils.Tensor(name, np.array([text.encode() for text in texts], dtype=np.object_))
