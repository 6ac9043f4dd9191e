"""parameters/: every name, type, range and combination; messages name parameter, value and limit."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import generate_parameter_docs
import pytest

from textgen_engine.adapters.spec import AdapterCommand
from textgen_engine.errors import InvalidParameter, Unsupported
from textgen_engine.parameters import PARAMETERS, ParameterLimits, RequestParameters, parse_parameters
from textgen_engine.request import GrammarCheck
from textgen_engine.sampling.params import SamplingParams

LIMITS = ParameterLimits(max_input_tokens=100, max_total_tokens=200)


def parse(given: dict[str, Any], stream: bool = False, limits: ParameterLimits = LIMITS) -> RequestParameters:
    return parse_parameters(given, limits=limits, stream=stream, vocab_size=1000)


def refusal(given: dict[str, Any], stream: bool = False, limits: ParameterLimits = LIMITS) -> str:
    with pytest.raises(InvalidParameter) as caught:
        parse(given, stream, limits)
    text = str(caught.value)
    assert text.startswith("Input validation error: ")
    return text


def read(given: dict[str, Any], path: str) -> Any:
    value: Any = parse(given)
    for name in path.split("."):
        value = getattr(value, name)
    return value


def test_nothing_given_is_greedy_and_changes_nothing() -> None:
    parsed = parse({})
    assert parsed.sampling == SamplingParams()
    assert parsed == RequestParameters(parsed.sampling, parsed.stopping, parsed.output)
    assert (parsed.n, parsed.best_of, parsed.output.skip_special_tokens) == (1, 1, True)


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [
        ("do_sample", True, "sampling.do_sample", True),
        ("seed", 2**64 - 1, "sampling.seed", 2**64 - 1),
        ("seed", 0, "sampling.seed", 0),
        ("random_seed", 5, "sampling.seed", 5),
        ("grammar_check", True, "grammar_check", GrammarCheck()),
        ("grammar_check", False, "grammar_check", None),
        ("grammar_check", {"text": "é"}, "grammar_check", GrammarCheck("é")),
        ("grammar_check", {"text": ""}, "grammar_check", GrammarCheck("")),
        ("temperature", 0.5, "sampling.temperature", 0.5),
        ("temperature", 2, "sampling.temperature", 2.0),
        ("top_k", 1, "sampling.top_k", 1),
        ("top_p", 0.9, "sampling.top_p", 0.9),
        ("top_p", 1.0, "sampling.top_p", 1.0),
        ("top_p", 1, "sampling.top_p", 1.0),
        ("typical_p", 0.95, "sampling.typical_p", 0.95),
        ("typical_p", 1.0, "sampling.typical_p", 1.0),
        ("min_p", 0, "sampling.min_p", 0.0),
        ("min_p", 1, "sampling.min_p", 1.0),
        ("repetition_penalty", 0.1, "sampling.repetition_penalty", 0.1),
        ("frequency_penalty", -2, "sampling.frequency_penalty", -2.0),
        ("presence_penalty", 2.0, "sampling.presence_penalty", 2.0),
        ("logit_bias", {"7": 1, "3": -100}, "sampling.logit_bias", ((3, -100.0), (7, 1.0))),
        ("logit_bias", {999: 0.5}, "sampling.logit_bias", ((999, 0.5),)),
        ("bad_words", ["a", "b", "a"], "bad_words", ("a", "b")),
        ("bad_words", "a", "bad_words", ("a",)),
        ("bad_words_ids", [[1], [2, 3]], "sampling.bad_words", ((1,), (2, 3))),
        ("allowed_token_ids", [5, 6, 5], "sampling.allowed_token_ids", (5, 6)),
        ("watermark", True, "sampling.watermark", True),
        ("max_new_tokens", 1, "stopping.max_new_tokens", 1),
        ("max_tokens", 7, "stopping.max_new_tokens", 7),
        ("max_completion_tokens", 7, "stopping.max_new_tokens", 7),
        ("min_new_tokens", 3, "stopping.min_new_tokens", 3),
        ("min_tokens", 3, "stopping.min_new_tokens", 3),
        ("stop", "x", "stopping.stop", ("x",)),
        ("stop", ["a", "b"], "stopping.stop", ("a", "b")),
        ("stop", [], "stopping.stop", ()),
        ("stop_sequences", ["a"], "stopping.stop", ("a",)),
        ("stop_token_ids", [0, 999], "stopping.stop_token_ids", (0, 999)),
        ("include_stop_str_in_output", True, "stopping.include_stop_str_in_output", True),
        ("ignore_eos_token", True, "stopping.ignore_eos_token", True),
        ("ignore_eos", True, "stopping.ignore_eos_token", True),
        ("details", True, "details", True),
        ("details", True, "output.token_details", True),
        ("details", True, "output.logprobs", True),
        ("decoder_input_details", True, "output.prompt_logprobs", True),
        ("decoder_input_details", True, "output.token_details", True),
        ("top_n_tokens", 5, "output.top_n_tokens", 5),
        ("top_n_tokens", 5, "output.logprobs", True),
        ("top_n_tokens", 0, "output.logprobs", False),
        ("top_logprobs", 2, "output.top_n_tokens", 2),
        ("logprobs", True, "output.logprobs", True),
        ("logprobs", False, "output.logprobs", False),
        ("logprobs", 0, "output.logprobs", True),
        ("logprobs", 3, "output.top_n_tokens", 3),
        ("prompt_logprobs", True, "output.prompt_logprobs", True),
        ("return_full_text", True, "return_full_text", True),
        ("echo", True, "return_full_text", True),
        ("skip_special_tokens", False, "output.skip_special_tokens", False),
        ("grammar", {"type": "regex", "value": "a+"}, "grammar", {"type": "regex", "value": "a+"}),
        ("response_format", {"type": "json_object"}, "response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}], "tools", ({"type": "function"},)),
        ("tools", [], "tools", ()),
        ("tool_choice", "auto", "tool_choice", "auto"),
        ("tool_choice", {"function": {"name": "f"}}, "tool_choice", {"function": {"name": "f"}}),
        ("tool_prompt", "Use:", "tool_prompt", "Use:"),
        ("truncate", 100, "truncate", 100),
        ("truncate_prompt_tokens", 1, "truncate", 1),
        ("add_special_tokens", False, "add_special_tokens", False),
        ("chat_template", "tool_use", "chat_template", "tool_use"),
        ("add_generation_prompt", False, "add_generation_prompt", False),
        ("continue_final_message", True, "continue_final_message", True),
        ("priority", -100, "priority", -100),
        ("timeout", 0.5, "timeout_s", 0.5),
        ("timeout", 30, "timeout_s", 30.0),
        ("adapter_id", "a", "adapter_id", "a"),
        ("lora_name", "a", "adapter_id", "a"),
        ("adapter_command", {"action": "list"}, "adapter_command", AdapterCommand("list")),
        (
            "adapter_command",
            {"action": "load", "name": "a", "path": "b"},
            "adapter_command",
            AdapterCommand("load", "a", "b"),
        ),
    ],
)
def test_accepted(name: str, value: Any, path: str, expected: Any) -> None:
    got = read({name: value}, path)
    assert got == expected
    assert type(got) is type(expected)


def test_choices_accepted() -> None:
    parsed = parse({"n": 2, "do_sample": True, "seed": 7}, stream=True)
    assert (parsed.n, parsed.best_of) == (2, 2)
    parsed = parse({"best_of": 2, "temperature": 0.5})
    assert (parsed.n, parsed.best_of) == (1, 2)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("do_sample", 1, "true or false; given: 1"),
        ("do_sample", "true", "true or false; given: 'true'"),
        ("seed", -1, "an integer between 0 and 2**64 - 1; given: -1"),
        ("seed", 2**64, "an integer between 0 and 2**64 - 1; given: 18446744073709551616"),
        ("seed", 1.0, "an integer between"),
        ("seed", True, "an integer between"),
        ("seed", "1", "given: '1'"),
        ("temperature", 0, "a number above 0 (for the most likely token leave it out"),
        ("temperature", 0.0, "set do_sample to false); given: 0.0"),
        ("temperature", -1, "given: -1"),
        ("temperature", float("nan"), "given: nan"),
        ("temperature", float("inf"), "given: inf"),
        ("temperature", 10**400, "a number above 0"),
        ("temperature", True, "given: True"),
        ("temperature", "0.5", "given: '0.5'"),
        ("temperature", [0.5], "given: [0.5]"),
        ("top_k", 0, "an integer between 1 and 2**31 - 1; given: 0"),
        ("top_k", -1, "given: -1"),
        ("top_k", 2**31, "given: 2147483648"),
        ("top_k", 5.0, "given: 5.0"),
        ("top_p", 0, "a number above 0 and at most 1; given: 0"),
        ("top_p", 1.01, "given: 1.01"),
        ("top_p", -1, "given: -1"),
        ("typical_p", 0, "a number above 0 and at most 1; given: 0"),
        ("typical_p", 1.5, "given: 1.5"),
        ("min_p", -0.1, "a number between 0 and 1; given: -0.1"),
        ("min_p", 1.1, "given: 1.1"),
        ("repetition_penalty", 0, "a number above 0; given: 0"),
        ("repetition_penalty", -1.5, "given: -1.5"),
        ("frequency_penalty", 2.1, "a number between -2 and 2; given: 2.1"),
        ("frequency_penalty", float("-inf"), "given: -inf"),
        ("presence_penalty", -2.1, "a number between -2 and 2; given: -2.1"),
        ("logit_bias", [1, 2], "an object of at most 1024 (max_list_entries) entries"),
        ("logit_bias", {"x": 1}, "integers between 0 and 999; given: 'x'"),
        ("logit_bias", {"1000": 1}, "integers between 0 and 999; given: 1000"),
        ("logit_bias", {"-1": 1}, "given: '-1'"),
        ("logit_bias", {"1": 101}, "a bias between -100 and 100; given: {'1': 101}"),
        ("logit_bias", {"1": True}, "given: {'1': True}"),
        ("logit_bias", {"1": float("nan")}, "given: {'1': nan}"),
        ("bad_words", [""], "each of 1 to 1000 characters; given: ['']"),
        ("bad_words", [1], "given: [1]"),
        ("bad_words_ids", [[]], "lists of 1 to 64 token ids; given: [[]]"),
        ("bad_words_ids", [1], "lists of 1 to 64 token ids"),
        ("bad_words_ids", [[1] * 65], "lists of 1 to 64 token ids"),
        ("bad_words", ["\ud800"], "a lone surrogate is at position 0"),
        ("stop", ["a\udfff"], "a lone surrogate is at position 1"),
        ("bad_words", ["x" * 1001], "each of 1 to 1000 characters"),
        ("bad_words_ids", [[1000]], "between 0 and 999; given: 1000"),
        ("allowed_token_ids", [], "not empty; given: []"),
        ("allowed_token_ids", [-1], "given: -1"),
        ("allowed_token_ids", 5, "a list of token ids"),
        ("watermark", 0.5, "true or false"),
        ("grammar_check", "yes", "true, false or an object"),
        ("grammar_check", {}, "true, false or an object"),
        ("grammar_check", {"text": 5}, "true, false or an object"),
        ("grammar_check", {"text": "a", "more": 1}, "true, false or an object"),
        ("grammar_check", {"text": "é" * 32769}, "65536 (max_checked_bytes) bytes; given: 65538 bytes"),
        ("n", 0, "an integer between 1 and 2 (max_best_of); given: 0"),
        ("n", 3, "an integer between 1 and 2 (max_best_of); given: 3"),
        ("best_of", 0, "an integer between 1 and 2 (max_best_of); given: 0"),
        ("best_of", 3, "an integer between 1 and 2 (max_best_of); given: 3"),
        ("max_new_tokens", 0, "an integer between 1 and 2**32 - 1; given: 0"),
        ("max_tokens", 0, "`max_tokens` must be an integer between 1"),
        ("min_new_tokens", -1, "given: -1"),
        ("min_new_tokens", 200, "below 200 (max_total_tokens); given: 200"),
        (
            "stop",
            ["a", "b", "c", "d", "e"],
            "at most 4 (max_stop_sequences) strings, each of 1 to 1000 characters; given: 5 entries",
        ),
        ("stop", "", "given: ''"),
        ("stop", 3, "given: 3"),
        ("stop_token_ids", [1.0], "given: 1.0"),
        ("stop_token_ids", [True], "given: True"),
        ("stop_token_ids", [1] * 1025, "given: 1025 entries"),
        ("ignore_eos_token", "no", "true or false"),
        ("details", 1, "true or false"),
        ("top_n_tokens", 6, "an integer between 0 and 5 (max_top_n_tokens); given: 6"),
        ("top_n_tokens", -1, "given: -1"),
        ("logprobs", 6, "true, false or an integer between 0 and 5 (max_top_n_tokens); given: 6"),
        ("logprobs", "yes", "given: 'yes'"),
        ("prompt_logprobs", 1, "true or false"),
        ("grammar", "a+", "an object; given: 'a+'"),
        ("response_format", [], "an object"),
        ("tools", {}, "a list of objects"),
        ("tools", ["f"], "a list of objects"),
        ("tool_choice", 3, "a string, not empty, or an object"),
        ("tool_choice", "", "a string, not empty, or an object"),
        ("tool_prompt", "", "a string of 1 to 65536 characters"),
        ("chat_template", 1, "a string of 1 to 65536 characters"),
        ("truncate", 0, "an integer between 1 and 100 (max_input_tokens); given: 0"),
        ("truncate", 101, "an integer between 1 and 100 (max_input_tokens); given: 101"),
        ("priority", 101, "an integer between -100 and 100; given: 101"),
        ("timeout", 0, "a number above 0; given: 0"),
        ("timeout", float("inf"), "a number above 0; given: inf"),
        ("adapter_id", "", "a string of 1 to 65536 characters; given: ''"),
        ("adapter_command", "list", "an object"),
        ("adapter_command", {"action": "list", "name": "a"}, "an object"),
        ("adapter_command", {"action": "load"}, "an object"),
        ("adapter_command", {"action": "unload", "name": "a", "path": "b"}, "an object"),
        ("adapter_command", {"action": "load", "name": 5}, "an object"),
        ("adapter_command", {"action": "load", "name": "a", "more": 1}, "an object"),
    ],
)
def test_refused(name: str, value: Any, said: str) -> None:
    text = refusal({name: value})
    assert f"`{name}`" in text
    assert said in text


@pytest.mark.parametrize(
    ("given", "stream", "said"),
    [
        ({"best_of": 2}, False, "`best_of` above 1 needs sampling (`do_sample: true`); given: 2"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, False, "`best_of` above 1 cannot have a `seed`; given: 2 and 1"),
        ({"best_of": 2, "do_sample": True}, True, "`best_of` must be 1 on a stream; given: 2"),
        ({"n": 2}, False, "`n` above 1 needs sampling"),
        ({"n": 2, "best_of": 1, "do_sample": True}, False, "`best_of` must be at least `n`, which is 2; given: 1"),
        ({"decoder_input_details": True}, True, "`decoder_input_details` must be false on a stream; given: true"),
        ({"min_new_tokens": 5, "max_tokens": 4}, False, "at most `max_new_tokens`, which is 4; given: 5"),
        ({"add_generation_prompt": True, "continue_final_message": True}, False, "exclude each other"),
        ({"max_tokens": 5, "max_new_tokens": 6}, False, "`max_tokens` and `max_new_tokens` are the same parameter"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, False, "given: 5 and 6"),
        ({"logprobs": 2, "top_n_tokens": 3}, False, "given: 2 and 3"),
    ],
)
def test_refused_together(given: dict[str, Any], stream: bool, said: str) -> None:
    assert said in refusal(given, stream)


def test_same_value_under_two_names_is_accepted() -> None:
    assert read({"max_tokens": 5, "max_new_tokens": 5, "max_completion_tokens": 5}, "stopping.max_new_tokens") == 5
    assert read({"stop": "a", "stop_sequences": ["a"]}, "stopping.stop") == ("a",)
    assert read({"logprobs": 2, "top_logprobs": 2}, "output.top_n_tokens") == 2
    assert read({"logprobs": True, "top_logprobs": 2}, "output.top_n_tokens") == 2


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("max_new_token", "max_new_tokens"), ("Temperature", "temperature"), ("topp", "top_p"), ("seeed", "seed")],
)
def test_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    assert f"unknown parameter `{name}`; did you mean `{nearest}`?" in refusal({name: 1})


def test_unknown_name_without_a_near_one() -> None:
    assert refusal({"zzzzqqqq": None}).endswith("unknown parameter `zzzzqqqq`")
    assert len(refusal({"q" * 5000: 1})) < 200


def test_null_means_not_given() -> None:
    names = [parameter.name for group in PARAMETERS for parameter in group.parameters]
    assert parse(dict.fromkeys(names)) == parse({})


@pytest.mark.parametrize(
    "given",
    [
        {"do_sample": True},
        {"temperature": 0.5},
        {"temperature": 1.0},
        {"top_k": 5},
        {"top_p": 0.9},
        {"typical_p": 0.9},
        {"min_p": 0.1},
        {"do_sample": False, "temperature": 0.7},
    ],
)
def test_what_turns_sampling_on(given: dict[str, Any]) -> None:
    sampling = parse(given).sampling
    assert sampling.do_sample
    assert sampling.seed is not None and 0 <= sampling.seed < 2**64
    assert parse(given).sampling.seed != sampling.seed  # drawn anew; equal once in 2**64


@pytest.mark.parametrize(
    "given",
    [{}, {"do_sample": False}, {"top_p": 1.0}, {"typical_p": 1}, {"min_p": 0.0}, {"repetition_penalty": 1.2}],
)
def test_what_stays_greedy(given: dict[str, Any]) -> None:
    sampling = parse(given).sampling
    assert not sampling.do_sample
    assert sampling.seed is None


def test_seed_of_a_greedy_request_is_kept() -> None:
    sampling = parse({"seed": 3}).sampling
    assert (sampling.do_sample, sampling.seed) == (False, 3)


def test_prefill_logprobs_switched_off() -> None:
    limits = dataclasses.replace(LIMITS, enable_prefill_logprobs=False)
    for name in ("decoder_input_details", "prompt_logprobs"):
        with pytest.raises(Unsupported, match="enable_prefill_logprobs"):
            parse({name: True}, limits=limits)
        parse({name: False}, limits=limits)


def test_limits_are_the_servers() -> None:
    limits = ParameterLimits(max_best_of=4, max_stop_sequences=1, max_top_n_tokens=20)
    assert parse({"n": 4, "do_sample": True}, limits=limits).n == 4
    assert parse({"truncate": 10**6}, limits=limits).truncate == 10**6
    assert "an integer of 1 or more" in refusal({"truncate": 0}, limits=limits)
    assert "at most 1 (max_stop_sequences)" in refusal({"stop": ["a", "b"]}, limits=limits)
    assert parse({"top_n_tokens": 20}, limits=limits).output.top_n_tokens == 20


def test_token_ids_without_a_known_vocabulary() -> None:
    parsed = parse_parameters({"stop_token_ids": [10**6]}, limits=LIMITS, stream=False, vocab_size=None)
    assert parsed.stopping.stop_token_ids == (10**6,)


def test_values_come_as_json_reads_them() -> None:
    given = json.loads('{"temperature": 1e-1, "logit_bias": {"5": -1}, "stop": ["\\n"], "seed": 18446744073709551615}')
    sampling = parse(given).sampling
    assert (sampling.temperature, sampling.logit_bias, sampling.seed) == (0.1, ((5, -1.0),), 2**64 - 1)


def test_documentation_page_is_current() -> None:
    page = generate_parameter_docs.PAGE.read_text(encoding="utf-8")
    assert page == generate_parameter_docs.render(), "run python scripts/generate_parameter_docs.py"
