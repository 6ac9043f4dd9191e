"""The table `PARAMETERS`: every name a client may send, its aliases, kind, range and one sentence of documentation.

docs/parameters.md is generated from it. Names are those of Text Generation Inference (TGI) where it has one; what
OpenAI's API and vLLM call otherwise is an alias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from textgen_engine.parameters.values import (
    INT32_MAX,
    UINT32_MAX,
    UINT64_MAX,
    Biases,
    Boolean,
    BooleanOrInteger,
    Check,
    Command,
    Integer,
    Number,
    Object,
    Objects,
    Reader,
    Text,
    TextOrObject,
    Texts,
    TokenIds,
    TokenIdSequences,
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One row of the table. default: as the documentation shows it. doc: one or two sentences of Markdown."""

    name: str
    reader: Reader
    default: str
    doc: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """A section of the documentation."""

    title: str
    parameters: tuple[Parameter, ...]


PARAMETERS: tuple[ParameterGroup, ...] = (
    ParameterGroup(
        "Choosing tokens",
        (
            Parameter(
                "do_sample",
                Boolean(),
                "false",
                "Draw each token at random; otherwise the most likely token is taken. Giving `temperature`, `top_k`, "
                "`top_p` or `typical_p` below 1, or `min_p` above 0 turns sampling on, even beside `do_sample: false`.",
            ),
            Parameter(
                "seed",
                Integer(0, UINT64_MAX),
                "drawn at random",
                "Start of the random numbers. The same seed gives the same text, alone or under load. The one that was "
                "used is reported in `details`. Allowed, without effect, when not sampling.",
                aliases=("random_seed",),
            ),
            Parameter(
                "temperature",
                Number(above=0, hint="(for the most likely token leave it out, or set do_sample to false)"),
                "1.0",
                "Divides the logits: below 1 makes likely tokens likelier. Given explicitly it turns sampling on, 1.0 "
                "included.",
            ),
            Parameter(
                "top_k",
                Integer(1, INT32_MAX),
                "off",
                "Sample among the k most likely tokens; exactly k, ties go to the lower id.",
            ),
            Parameter(
                "top_p",
                Number(above=0, high=1),
                "1.0 (off)",
                "Sample among the most likely tokens that together reach this probability (nucleus sampling).",
            ),
            Parameter(
                "typical_p",
                Number(above=0, high=1),
                "1.0 (off)",
                "Sample among the tokens whose surprise is nearest to the expected one and that together reach this "
                "probability (locally typical sampling).",
            ),
            Parameter(
                "min_p",
                Number(low=0, high=1),
                "0.0 (off)",
                "Sample among the tokens at least this many times as likely as the most likely one.",
            ),
            Parameter(
                "repetition_penalty",
                Number(above=0),
                "1.0 (off)",
                "Divides positive and multiplies negative logits of tokens that the prompt or the output holds (CTRL).",
            ),
            Parameter(
                "frequency_penalty",
                Number(low=-2, high=2),
                "0.0 (off)",
                "Subtracted from a token's logit once for each time the output holds it (OpenAI's definition).",
            ),
            Parameter(
                "presence_penalty",
                Number(low=-2, high=2),
                "0.0 (off)",
                "Subtracted from a token's logit when the output holds it (OpenAI's definition).",
            ),
            Parameter(
                "logit_bias",
                Biases("max_list_entries"),
                "{}",
                'Added to the logits of these tokens, as in OpenAI\'s API: `{"1234": -100}`.',
            ),
            Parameter(
                "bad_words",
                Texts("max_list_entries"),
                "[]",
                "Texts that must not be generated, each as the tokenizer writes it at the start of a word and inside "
                "one.",
            ),
            Parameter(
                "bad_words_ids",
                TokenIdSequences("max_list_entries"),
                "[]",
                "Token id sequences that must not be completed.",
            ),
            Parameter(
                "allowed_token_ids",
                TokenIds(None, empty=False),
                "all",
                "The only tokens that may be generated. Include an end-of-sequence token if the text may end.",
            ),
            Parameter(
                "watermark",
                Boolean(),
                "false",
                "Favour a pseudo-random half of the vocabulary after each token, so that the text can be recognized "
                "later (Kirchenbauer et al.); `watermark_gamma` and `watermark_delta` are options of the server.",
            ),
        ),
    ),
    ParameterGroup(
        "Choices",
        (
            Parameter(
                "n",
                Integer(1, "max_best_of"),
                "1",
                "How many texts to generate for the prompt, which is computed once. More than one needs sampling.",
            ),
            Parameter(
                "best_of",
                Integer(1, "max_best_of"),
                "`n`",
                "Generate this many texts and report the `n` with the highest mean token log-probability. Above 1 it "
                "needs sampling, and neither a seed nor a stream.",
            ),
        ),
    ),
    ParameterGroup(
        "Length and end",
        (
            Parameter(
                "max_new_tokens",
                Integer(1, UINT32_MAX),
                "what `max_total_tokens` leaves",
                "Most tokens to generate. Prompt and new tokens together must not exceed `max_total_tokens`.",
                aliases=("max_tokens", "max_completion_tokens"),
            ),
            Parameter(
                "min_new_tokens",
                Integer(0, UINT32_MAX),
                "0",
                "Tokens to generate before the text may end by an end token.",
                aliases=("min_tokens",),
            ),
            Parameter(
                "stop",
                Texts("max_stop_sequences"),
                "[]",
                "The text ends where one of these first appears, also inside a token.",
                aliases=("stop_sequences",),
            ),
            Parameter(
                "stop_token_ids",
                TokenIds("max_list_entries"),
                "[]",
                "Tokens that end the text as an end-of-sequence token does.",
            ),
            Parameter(
                "include_stop_str_in_output",
                Boolean(),
                "false",
                "Keep the stop string at the end of the text.",
            ),
            Parameter(
                "ignore_eos_token",
                Boolean(),
                "false",
                "Go on after an end-of-sequence token; for measurements with fixed lengths.",
                aliases=("ignore_eos",),
            ),
        ),
    ),
    ParameterGroup(
        "What is reported",
        (
            Parameter(
                "details",
                Boolean(),
                "false",
                "Report finish reason, seed, timings and every token with its log-probability.",
            ),
            Parameter(
                "decoder_input_details",
                Boolean(),
                "false",
                "Also report the prompt's tokens with their log-probabilities. Not on a stream.",
            ),
            Parameter(
                "top_n_tokens",
                Integer(0, "max_top_n_tokens"),
                "0",
                "Report the n most likely tokens at each position; exactly n, ties go to the lower id.",
                aliases=("top_logprobs",),
            ),
            Parameter(
                "logprobs",
                BooleanOrInteger("max_top_n_tokens"),
                "false",
                "Report the log-probability of each token; a number also sets `top_n_tokens`, as in OpenAI's "
                "completions. Log-probabilities are the model's own, before penalties and filters.",
            ),
            Parameter(
                "prompt_logprobs",
                Boolean(),
                "false",
                "Report the log-probability of each prompt token.",
            ),
            Parameter(
                "return_full_text",
                Boolean(),
                "false",
                "Put the prompt in front of the generated text.",
                aliases=("echo",),
            ),
            Parameter(
                "skip_special_tokens",
                Boolean(),
                "true",
                "Leave special tokens out of the text.",
            ),
        ),
    ),
    ParameterGroup(
        "Form of the output",
        (
            Parameter(
                "grammar",
                Object(),
                "none",
                'Force the output into a form: `{"type": "json", "value": <JSON Schema>}`, or type `regex`, `choice`, '
                "`json_object`, `lark` or `ebnf` (see grammar.md).",
            ),
            Parameter(
                "grammar_backend",
                Text(),
                "the server's",
                "Library that enforces the grammar: `llguidance`, `xgrammar` or `lmfe`.",
            ),
            Parameter(
                "grammar_whitespace",
                Text(),
                "`bounded`",
                "Whitespace between the tokens of JSON: `bounded`, `flexible` or `none`.",
            ),
            Parameter(
                "grammar_property_order",
                Text(),
                "`any`",
                "Order of the properties in JSON objects: `any`, or that of the `schema`.",
            ),
            Parameter(
                "grammar_lenient",
                Boolean(),
                "false",
                "Drop schema keywords that cannot be enforced, with a warning, instead of refusing the schema.",
            ),
            Parameter(
                "grammar_check",
                Check(),
                "false",
                "Generate nothing: say whether the grammar is supported, and whether a text obeys it. The request has "
                "no prompt, and its other parameters have no effect. `text_output` is a JSON object: `supported`, "
                "`backend`, `warnings`, `error` (why not supported), `accepted` (null: not decided, or no text given), "
                "`accepted_prefix` (characters that the grammar takes), `reason` (why not accepted).",
            ),
            Parameter(
                "response_format",
                Object(),
                "none",
                "The same in OpenAI's spelling: `json_object`, or `json_schema` with a schema.",
            ),
            Parameter("tools", Objects(), "none", "Functions the model may call, as in OpenAI's chat API."),
            Parameter(
                "tool_choice",
                TextOrObject(),
                "`auto`",
                "`auto`, `none`, `required`, a function's name, or OpenAI's object that names one.",
            ),
            Parameter(
                "parallel_tool_calls",
                Boolean(),
                "`false`",
                "Allow several calls in one answer, as a list; a `tool_choice` that names a function means one call. "
                "OpenAI's routes of the gateway allow them unless told otherwise.",
            ),
            Parameter("tool_prompt", Text(), "the server's", "Text put before the tools when the template has none."),
        ),
    ),
    ParameterGroup(
        "The prompt",
        (
            Parameter(
                "truncate",
                Integer(1, "max_input_tokens"),
                "off",
                "Keep only the last so many tokens of the prompt.",
                aliases=("truncate_prompt_tokens",),
            ),
            Parameter(
                "add_special_tokens",
                Boolean(),
                "true for text, false for messages",
                "Let the tokenizer add its special tokens (such as the one that begins a sequence).",
            ),
            Parameter(
                "chat_template",
                Text(),
                "the model's default",
                "Name of the chat template, for a model that has several. A template itself is not accepted.",
            ),
            Parameter(
                "add_generation_prompt",
                Boolean(),
                "true unless the last message is the assistant's",
                "End the rendered messages with the header of an answer.",
            ),
            Parameter(
                "continue_final_message",
                Boolean(),
                "true if the last message is the assistant's",
                "Continue the last message instead of answering it.",
            ),
            Parameter("documents", Objects(), "none", "Documents for chat templates that take them."),
            Parameter("chat_template_kwargs", Object(), "none", "Further variables of the chat template."),
        ),
    ),
    ParameterGroup(
        "Service",
        (
            Parameter(
                "priority",
                Integer(-100, 100),
                "0",
                "Larger is served sooner. A waiting request gains priority with time.",
            ),
            Parameter(
                "timeout",
                Number(above=0),
                "the server's",
                "Seconds from arrival after which the request ends: a stream with what it has, otherwise with an "
                "error. Triton's own request timeout counts too, whichever is shorter.",
            ),
            Parameter(
                "adapter_id",
                Text(),
                "none",
                "LoRA adapter to generate with (see adapters.md); a name that is not loaded is refused.",
                aliases=("lora_name",),
            ),
            Parameter(
                "trace_tokens",
                Boolean(),
                "false",
                "An event for every token in the request's trace, where the server makes traces (`OTLP_ENDPOINT`).",
            ),
            Parameter(
                "adapter_command",
                Command(),
                "none",
                "Generate nothing: load or unload an adapter where the server allows it, or list them. The request has "
                "no prompt, and its other parameters have no effect. `text_output` is a JSON object (see adapters.md).",
            ),
        ),
    ),
)


def _names(groups: Sequence[ParameterGroup]) -> dict[str, Parameter]:
    table: dict[str, Parameter] = {}
    for group in groups:
        for parameter in group.parameters:
            for name in (parameter.name, *parameter.aliases):
                assert name not in table, f"the name {name} is taken"
                table[name] = parameter
    return table


# By every name that a client may use.
BY_NAME: Mapping[str, Parameter] = _names(PARAMETERS)
