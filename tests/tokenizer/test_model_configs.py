"""The models' config.pbtxt agree with one another: the ensemble offers what textgen offers, wired to its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"


def _config(model: str) -> Any:
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse((REPOSITORY / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def _tensors(tensors: Any) -> dict[str, tuple[int, tuple[int, ...], bool]]:
    return {
        tensor.name: (tensor.data_type, tuple(tensor.dims), getattr(tensor, "optional", False)) for tensor in tensors
    }


def test_the_ensemble_offers_what_textgen_offers() -> None:
    ensemble, textgen = _config("ensemble"), _config("textgen")
    inputs = _tensors(textgen.input)
    for name in ("cancel", "model_info"):
        del inputs[name]  # such a request has no prompt for the first step
    del inputs["prompt_text"]  # comes from the first step
    assert _tensors(ensemble.input) == inputs
    assert _tensors(ensemble.output) == _tensors(textgen.output)


def test_the_ensembles_wiring() -> None:
    """Every input reaches each step that has it, every output comes from textgen."""
    ensemble = _config("ensemble")
    first, second = ensemble.ensemble_scheduling.step
    offered = set(_tensors(ensemble.input))
    prompt = {"text_input", "messages", "input_ids"}
    assert dict(first.input_map) == {name: name for name in prompt | {"sampling_parameters"}}
    assert dict(first.output_map) == {"input_ids": "prompt_ids", "prompt_text": "prompt_text"}
    passed = {name: name for name in (offered - prompt) | {"prompt_text"}}
    assert dict(second.input_map) == passed | {"input_ids": "prompt_ids"}
    assert dict(second.output_map) == {output.name: output.name for output in ensemble.output}
    for step in (first, second):
        theirs = _config(step.model_name)
        assert set(step.input_map) <= set(_tensors(theirs.input))
        assert set(step.output_map) <= set(_tensors(theirs.output))


def test_every_input_is_optional() -> None:
    for model in ("tokenizer", "textgen", "ensemble"):
        assert all(tensor.optional for tensor in _config(model).input)
