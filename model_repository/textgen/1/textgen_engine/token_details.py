"""Tokens as clients see them: id, text, log-probability and the likeliest others, where a request asks for them."""

from __future__ import annotations

from textgen_engine.detokenizer import Detokenizer
from textgen_engine.launched import ScoreReader
from textgen_engine.live_requests import Choice, LiveRequest
from textgen_engine.request import TokenDetail, TokenOutput
from textgen_engine.sampling.sampler import PromptLogprobs
from textgen_engine.scheduler import ScheduledSequence


class TokenDetails:
    """Made from the step's scores on the host."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer

    def describe(self, choice: Choice, output: TokenOutput, reader: ScoreReader, row: int) -> None:
        """Add what the request wants to know of the token sampled from `row`, the output's last."""
        wanted = choice.sequence.request.output
        if wanted.token_details or wanted.logprobs or wanted.top_n_tokens:
            token_id = output.token_ids[-1]
            is_special = self._detokenizer.is_special(token_id)
            top = self._top(reader.top(row, wanted.top_n_tokens))
            output.details.append(TokenDetail(token_id, choice.last_token_text, reader.logprob(row), is_special, top))

    def note_prompt(self, live: LiveRequest, entry: ScheduledSequence, scores: PromptLogprobs) -> None:
        """Keep the scores of a chunk's prompt tokens; a chunk computed again after preemption adds nothing."""
        prompt, wanted = live.request.prompt_token_ids, live.request.output.top_n_tokens
        if not live.prompt_details:
            live.prompt_details.append(self._detail(prompt[0], None))
        reader = ScoreReader(scores)
        for row in range(len(scores.logprobs)):
            position = entry.start + 1 + row
            if position == len(live.prompt_details):
                detail = self._detail(prompt[position], reader.logprob(row))
                detail.top = self._top(reader.top(row, wanted))
                live.prompt_details.append(detail)

    def of_prompt(self, live: LiveRequest) -> list[TokenDetail]:
        """What is noted of the prompt, once all of it is computed."""
        # A prompt of one token has nothing to score.
        return live.prompt_details or [self._detail(live.request.prompt_token_ids[0], None)]

    def _detail(self, token_id: int, logprob: float | None) -> TokenDetail:
        text = self._detokenizer.token_text(token_id)
        return TokenDetail(token_id, text, logprob, self._detokenizer.is_special(token_id))

    def _top(self, top: list[tuple[int, float]]) -> list[TokenDetail]:
        return [self._detail(token_id, logprob) for token_id, logprob in top]
