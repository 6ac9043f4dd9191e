"""Triton's lifecycle of the `textgen` model: initialize, execute, finalize.

The stub stays thin: it parses, asks the `tokenizer` model, submits to the engine's process, sends what comes back and
polls for cancellation. It never imports torch, and never makes `execute` wait: a request is refused or queued there,
everything else happens on threads.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# An installed package of the same name must not win over the one beside this file.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import triton_python_backend_utils as pb_utils
import triton_request_log
import triton_requests
import triton_responses
import triton_tokenizer
from triton_metrics import MetricsPublisher
from triton_parent import end_with_parent
from triton_responder import LiveRequest, Responder
from triton_tracing import start_tracer

from textgen_engine.config import EngineConfig
from textgen_engine.configure import build_config
from textgen_engine.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    EngineFailure,
    InvalidParameter,
    ModelLoadError,
    NotReady,
    Overloaded,
)
from textgen_engine.host_devices import visible_gpus
from textgen_engine.logs import configure_logging
from textgen_engine.messages import StepReport
from textgen_engine.parameters import ParameterLimits
from textgen_engine.process import EngineClient, EngineState

logger = logging.getLogger(__name__)

# Threads that parse requests and ask the tokenizer; its instances do the work, these wait for them.
_NUM_ADMISSION_THREADS = 4
_NUM_TOKENIZER_TRIES = 3
_DRAIN_TIMEOUT_S = 90.0


class TritonPythonModel:
    """One instance serves the whole server; Triton calls its methods from one thread."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the engine's process and wait until the model is loaded."""
        end_with_parent()
        try:
            self._config = _read_config(args)
            self._tokenizer_version = _tokenizer_version(args)
            configure_logging(self._config.log_level, as_json=self._config.json_output, source="textgen")
            self._engine = EngineClient(self._config, self._on_report)
            self._info = self._engine.start()
        except (ConfigError, ModelLoadError) as error:
            # Triton wraps the exception in pages of its own; this line is what scripts/serve.py shows.
            print(f"textgen: fatal: {error}", file=sys.stderr, flush=True)
            raise pb_utils.TritonModelException(str(error)) from None
        limits = self._config.limits
        self._limits = ParameterLimits(
            max_best_of=limits.max_best_of,
            max_stop_sequences=limits.max_stop_sequences,
            max_top_n_tokens=limits.max_top_n_tokens,
            max_input_tokens=self._info.max_input_tokens,
            max_total_tokens=self._info.max_total_tokens,
            enable_prefill_logprobs=limits.enable_prefill_logprobs,
        )
        self._keys = itertools.count()
        self._finalizing = False
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._metrics = MetricsPublisher(
            self._info, labels, is_ready=self.is_ready, num_restarts=lambda: self._engine.num_restarts
        )
        self._tracer = start_tracer(self._config.tracing, labels, self._config.model.model_id)
        self._responder = Responder(self._config.transport, self._on_client_gone)
        self._responder.start()
        self._admission = ThreadPoolExecutor(_NUM_ADMISSION_THREADS, thread_name_prefix="admission")

    def execute(self, requests: list[Any]) -> None:
        """Take requests in. Refuses at once what exceeds max_concurrent_requests; returns without waiting."""
        for request in requests:
            arrival_s = time.monotonic()
            key = str(next(self._keys))
            live = LiveRequest(key, request.request_id(), request.get_response_sender(), arrival_s)
            limit = self._config.limits.max_concurrent_requests
            if self._finalizing:
                self._answer_at_once(live, NotReady("the server is stopping"))
            elif _is(triton_requests.is_info_request, request):
                # Nothing of it is counted, and a full server answers it: it is no request to generate.
                triton_responses.send(live.sender, triton_responses.info_response(self._config, self._info), final=True)
            elif self._responder.num_live >= limit and not _is(triton_requests.is_cancel_request, request):
                self._metrics.count("tgi_request_count")
                self._trace(live, request)
                error = Overloaded(f"{limit} requests are live (max_concurrent_requests)")
                self._note_failure(live, error)
                self._answer_at_once(live, error)
            else:
                self._responder.add(live)
                self._admission.submit(self._admit, live, request)

    def finalize(self) -> None:
        """Let live requests end, then end the engine and the threads."""
        self._finalizing = True
        self._admission.shutdown(wait=True)
        self._responder.wait_until_idle(_DRAIN_TIMEOUT_S)
        self._engine.stop()  # answers what is still live; the responder sends it
        self._responder.stop()
        self._metrics.stop()
        if self._tracer is not None:
            self._tracer.stop()

    def is_ready(self) -> bool:
        """Asked by servers newer than 2.51 for the model's readiness; older ones show `tgi_engine_ready` instead."""
        return self._engine.state is EngineState.READY

    # ---- admission threads -------------------------------------------------------------------------------------

    def _admit(self, live: LiveRequest, request: Any) -> None:
        try:
            if _is(triton_requests.is_cancel_request, request):
                self._cancel_by_id(live)
                return
            self._metrics.count("tgi_request_count")
            self._trace(live, request)
            self._submit(live, request)
        except EngineError as error:
            self._fail(live, error)
        except Exception:
            logger.exception("a request could not be admitted")
            self._fail(live, EngineFailure("the request could not be read"))

    def _submit(self, live: LiveRequest, request: Any) -> None:
        parsed = triton_requests.parse_request(
            request,
            limits=self._limits,
            vocab_size=self._info.vocab_size,
            grammar_config=self._config.grammar,
        )
        live.options = parsed.options
        if self._tracer is not None:
            self._tracer.note_parsed(live, parsed)
        live.adapter_id = parsed.parameters.adapter_id
        if parsed.grammar_refusal is not None:
            self._metrics.count("tgi_request_success")
            self._responder.reply(live, triton_responses.text_response(parsed.grammar_refusal.to_json()))
            if self._tracer is not None:
                self._tracer.end(live)
            return
        timeout_s = triton_requests.request_timeout_s(request, parsed.parameters, self._config.limits.default_timeout_s)
        if parsed.input_ids is not None:
            prompt_ids, prompt_text = parsed.input_ids, parsed.prompt_text
        else:
            prompt_ids, prompt_text = self._tokenize(request, parsed)
        if self._config.log_prompts:
            live.logged_prompt, live.logged_texts = prompt_text, {}
        generation_request = triton_requests.build_request(
            parsed,
            request_id=live.key,
            prompt_ids=prompt_ids,
            info=self._info,
            arrival_s=live.arrival_s,
            timeout_s=timeout_s,
        )
        if parsed.options.return_full_text:
            if prompt_text is None:
                prompt_text = self._tokenize(request, parsed)[1]
            live.prompt_prefix = prompt_text
        if generation_request.deadline_s is not None and generation_request.deadline_s <= time.monotonic():
            raise DeadlineExceeded(f"not started within {timeout_s:.3g} seconds")
        live.validation_s = time.monotonic() - live.arrival_s
        if live.cancelled:
            raise Cancelled("ended before it was queued")
        if self._tracer is not None:
            self._tracer.note_submitted(live)
        if generation_request.prompt_token_ids:  # a grammar check or an adapter command generates nothing
            room = self._info.max_total_tokens - len(generation_request.prompt_token_ids)
            wanted = generation_request.stopping.max_new_tokens
            self._metrics.note_queued(room if wanted is None else wanted)
        self._engine.submit(generation_request)
        self._responder.note_submitted(live)
        if live.cancelled:  # between the check and the submission
            self._engine.cancel(live.key)

    def _tokenize(self, request: Any, parsed: triton_requests.ParsedRequest) -> tuple[list[int], str]:
        """Ids and text of the prompt. Until a dead instance of the tokenizer is replaced, Triton gives it requests all
        the same, and answers after a second that it is not healthy: then another instance is asked."""
        for _ in range(_NUM_TOKENIZER_TRIES):
            response = triton_tokenizer.tokenizer_request(request, parsed, self._tokenizer_version).exec()
            if not triton_tokenizer.is_from_dead_stub(response):
                break
        return triton_tokenizer.read_tokenizer_response(response)

    def _cancel_by_id(self, live: LiveRequest) -> None:
        """Answer a `cancel` request. Nothing of it is counted: it is no request to generate."""
        targets = [target for target in self._responder.by_client_id(live.client_id) if target is not live]
        if not live.client_id:
            error = InvalidParameter("`cancel` needs the id of a live request as the request's id")
            self._responder.fail(live, error)
        elif not targets:
            error = InvalidParameter(f"`cancel`: no live request has the id {live.client_id!r}")
            self._responder.fail(live, error)
        else:
            for target in targets:
                self._on_client_gone(target)
            self._responder.reply(live, triton_responses.text_response(""))

    def _fail(self, live: LiveRequest, error: EngineError) -> None:
        if self._responder.fail(live, error):
            self._note_failure(live, error)

    def _note_failure(self, live: LiveRequest, error: EngineError) -> None:
        self._metrics.note_failure(error)
        triton_request_log.note_failed(live, error)
        if self._tracer is not None:
            self._tracer.end(live, error)

    def _trace(self, live: LiveRequest, request: Any) -> None:
        if self._tracer is not None:
            self._tracer.begin(live, triton_requests.trace_context(request))

    def _answer_at_once(self, live: LiveRequest, error: EngineError) -> None:
        triton_responses.send(live.sender, triton_responses.error_response(error), final=True)

    # ---- the engine's and the poller's threads -----------------------------------------------------------------

    def _on_report(self, report: StepReport) -> None:
        if self._tracer is not None:
            self._tracer.note_report(report)
        begun_s = time.monotonic()
        completed = self._responder.deliver(report)
        deliver_s = time.monotonic() - begun_s
        for live in completed:
            if live.error is not None:
                self._note_failure(live, live.error)
                continue
            triton_request_log.note_answered(live)
            if self._tracer is not None:
                self._tracer.end(live)
            self._metrics.note_success(
                live.timings,
                num_input=live.num_input_tokens,
                num_output=sum(live.num_tokens.values()),
                validation_s=live.validation_s,
                adapter_id=live.adapter_id,
            )
        # Last, so that gauges never show a request as gone that is not yet answered and counted.
        if report.metrics is not None:
            self._metrics.note_step(report.metrics, deliver_s)

    def _on_client_gone(self, live: LiveRequest) -> None:
        live.cancelled = True
        if live.submitted:
            self._engine.cancel(live.key)
        else:
            self._fail(live, Cancelled("ended before it was queued"))


def _is(kind: Callable[[Any], bool], request: Any) -> bool:
    """Whether a request is of a kind; one that is malformed is of none, and refused where it is parsed."""
    try:
        return kind(request)
    except EngineError:
        return False


def _read_config(args: dict[str, str]) -> EngineConfig:
    model_config = json.loads(args["model_config"])
    parameters = {name: value["string_value"] for name, value in model_config.get("parameters", {}).items()}
    num_gpus = visible_gpus()
    environment = os.environ | _version_options()
    return build_config(parameters, environment, has_gpu=num_gpus > 0, num_gpus=num_gpus or None)


def _version_options() -> dict[str, str]:
    """options.json beside this file: variables of this version alone, which win over the environment. Written by
    scripts/update_model.py, so that a version with another checkpoint can be loaded beside one that serves."""
    path = Path(__file__).with_name("options.json")
    return {name: str(value) for name, value in json.loads(path.read_text()).items()} if path.is_file() else {}


def _tokenizer_version(args: dict[str, str]) -> int:
    """The tokenizer's version of the same number, where there is one: during an update both are served, and a model
    must be given its own tokenizer's ids. Else the latest (-1)."""
    version = args["model_version"]
    return int(version) if (Path(args["model_repository"]).parent / "tokenizer" / version).is_dir() else -1
