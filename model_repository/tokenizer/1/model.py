"""Triton's side of the tokenizer: tensors to `TokenizerRequest`, `TokenizerAnswer` to tensors, errors to responses.

The work is in the package beside this file, which knows nothing of Triton. Nothing heavy is imported at the top:
Triton may start this file once more just to ask whether it completes its configuration.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils

from textgen_tokenizer.config import TokenizerConfig, read_config
from textgen_tokenizer.errors import TokenizerError, Unsupported
from textgen_tokenizer.service import TokenizerAnswer, TokenizerRequest, TokenizerService

if TYPE_CHECKING:
    from textgen_tokenizer.loading import LoadedTokenizer


class TritonPythonModel:
    """One instance: a process with one tokenizer, which answers one request at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer. Raises TritonModelException with one line of text when that fails."""
        try:
            parameters = {
                name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()
            }
            config = read_config(parameters, os.environ | _version_options())
            _prepare_process(trust_remote_code=config.trust_remote_code)
            self._service = TokenizerService(_load(config))
        except Exception as error:  # whatever it is, the server must say so in one line
            line = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"textgen: fatal: tokenizer: {line}", file=sys.stderr, flush=True)
            raise pb_utils.TritonModelException(f"cannot load the tokenizer: {line}") from error

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request; a failing request answers with its own error and disturbs no other."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            return pb_utils.InferenceResponse(_to_tensors(self._service.answer(_to_request(request))))
        except TokenizerError as error:
            code = (
                pb_utils.TritonError.UNSUPPORTED if isinstance(error, Unsupported) else pb_utils.TritonError.INVALID_ARG
            )
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
        except Exception as error:  # ours or a library's fault: logged in full, answered without a traceback
            traceback.print_exc(file=sys.stderr)
            text = str(TokenizerError(f"the tokenizer failed: {type(error).__name__}"))
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, pb_utils.TritonError.INTERNAL))


def _version_options() -> dict[str, str]:
    """options.json beside this file, as in textgen: variables of this version alone, which win over the environment."""
    path = Path(__file__).with_name("options.json")
    return {name: str(value) for name, value in json.loads(path.read_text()).items()} if path.is_file() else {}


def _prepare_process(trust_remote_code: bool) -> None:
    """Settings of this process that must stand before transformers is imported."""
    # A pool of threads per instance would compete with the other instances and with the engine.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not trust_remote_code and "torch" not in sys.modules:
        # A tokenizer needs no torch, but transformers imports it where it can: without it, an instance starts in 1.1
        # instead of 3.5 seconds and takes 130 instead of 400 MB. (A checkpoint's own code may need it.)
        sys.modules["torch"] = None  # type: ignore[assignment]


def _load(config: TokenizerConfig) -> LoadedTokenizer:
    """The tokenizer. What is imported stays, so the collector need not go through all of it, now or later."""
    gc.disable()
    try:
        from textgen_tokenizer.loading import load

        loaded = load(config)
        gc.freeze()
    finally:
        gc.enable()
    return loaded


def _to_request(request: Any) -> TokenizerRequest:
    action = _bytes(request, "action")
    return TokenizerRequest(
        action=None if action is None else action.decode("utf-8", "replace"),
        text_input=_bytes(request, "text_input"),
        messages=_bytes(request, "messages"),
        input_ids=_ids(request, "input_ids"),
        token_ids=_ids(request, "token_ids"),
        sampling_parameters=_bytes(request, "sampling_parameters"),
        parameters=json.loads(request.parameters() or "{}"),
    )


def _to_tensors(answer: TokenizerAnswer) -> list[Any]:
    tensors = []
    if answer.input_ids is not None:
        tensors.append(pb_utils.Tensor("input_ids", np.array(answer.input_ids, dtype=np.int32)))
    if answer.prompt_text is not None:
        tensors.append(_string_tensor("prompt_text", answer.prompt_text))
    if answer.tokens is not None:
        spans = json.dumps([asdict(token) for token in answer.tokens], ensure_ascii=False)
        tensors.append(_string_tensor("tokens", spans))
    if answer.text is not None:
        tensors.append(_string_tensor("text", answer.text))
    return tensors


def _bytes(request: Any, name: str) -> bytes | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    value: bytes | str = tensor.as_numpy().reshape(-1)[0]
    return value.encode() if isinstance(value, str) else value


def _ids(request: Any, name: str) -> list[int] | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()


def _string_tensor(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.array([text.encode()], dtype=np.object_))
