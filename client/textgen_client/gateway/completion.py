"""/v1/completions: one prompt or several, and what continues them."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from textgen_client.aio import AsyncStream
from textgen_client.errors import ValidationError
from textgen_client.gateway.backend import Backend
from textgen_client.gateway.exchange import Exchange, details_of, told_reason
from textgen_client.gateway.openai_bodies import CompletionRequest
from textgen_client.results import Chunk, Generation


class Completion(Exchange):
    """One request of the route."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    id_prefix = "cmpl"
    own_fields = Exchange.own_fields | {"suffix"}

    def __init__(
        self, request: Request, backend: Backend, body: CompletionRequest, model: str, adapter: str | None
    ) -> None:
        """Raises ValidationError."""
        super().__init__(request, backend, body, model, adapter)
        if body.suffix:
            raise ValidationError("`suffix` is not supported")
        self._prompts = _prompts(body.prompt, backend.settings.max_client_batch_size)
        self._logprobs = body.logprobs is not None
        if self._logprobs:
            self.parameters |= {"details": True, "top_n_tokens": body.logprobs or None}
        # Where each choice's next token begins in its text.
        self._offsets = [0] * (len(self._prompts) * self.num_choices)

    @property
    def num_characters(self) -> int:
        return sum(len(prompt["prompt"]) for prompt in self._prompts if "prompt" in prompt)

    async def generate(self) -> list[Generation]:
        """The whole answer to each prompt, in order; the first error ends all."""
        parameters = self.whole_parameters()
        tasks = [
            asyncio.ensure_future(self.backend.generate(self.request, parameters, **prompt)) for prompt in self._prompts
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def streams(self) -> list[AsyncStream]:
        """The answer to each prompt in chunks."""
        parameters = self.stream_parameters()
        return [self.backend.stream(self.request, parameters, **prompt) for prompt in self._prompts]

    def choice(self, generation: Generation, position: int, index: int) -> dict[str, Any]:
        found = generation.choices[position]
        return {
            "index": index,
            "text": found.text,
            "logprobs": self._told_logprobs(generation, position, index),
            "finish_reason": told_reason(found.finish_reason),
        }

    def chunk_choices(self, chunk: Chunk, prompt: int) -> list[dict[str, Any]]:
        choices = []
        for position, found in enumerate(chunk.choices):
            index = prompt * self.num_choices + position
            logprobs = self._told_logprobs(chunk, position, index)
            if found.text or found.finish_reason is not None or (logprobs and logprobs["tokens"]):
                reason = told_reason(found.finish_reason)
                choices.append({"index": index, "text": found.text, "logprobs": logprobs, "finish_reason": reason})
        return choices

    def _told_logprobs(self, answer: Generation | Chunk, position: int, index: int) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        details = details_of(answer, position)
        tokens = details["tokens"]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token["text"])
        tops = details.get("top_tokens") or [[] for _ in tokens]
        return {
            "tokens": [token["text"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [{other["text"]: other["logprob"] for other in top} for top in tops],
            "text_offset": offsets,
        }


def _prompts(prompt: str | list[Any], most: int) -> list[dict[str, Any]]:
    """Each prompt as the client takes it."""
    if isinstance(prompt, str):
        return [{"prompt": prompt}]
    if not prompt:
        raise ValidationError("`prompt` must not be empty")
    if isinstance(prompt[0], int):
        return [{"input_ids": prompt}]
    if len(prompt) > most:
        raise ValidationError(
            f"`prompt` must have at most {most} entries (MAX_CLIENT_BATCH_SIZE); given: {len(prompt)}"
        )
    return [{"prompt": one} if isinstance(one, str) else {"input_ids": one} for one in prompt]
