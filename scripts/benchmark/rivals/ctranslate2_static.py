"""CTranslate2's Generator behind rival_protocol.py. It batches statically: the requests of a batch start together."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rival_protocol import Request, parser, serve, take_over_stdout


def main() -> None:
    """Load, then answer."""
    given = parser(__doc__).parse_args()
    answers = take_over_stdout()
    import ctranslate2

    generator = ctranslate2.Generator(given.model, device="cpu", inter_threads=1, intra_threads=given.threads)
    vocabulary = json.loads((Path(given.model) / "vocabulary.json").read_text())

    def run(requests: list[Request], concurrency: int, new_tokens: int) -> None:
        if concurrency > 1:
            raise NotImplementedError("prompts of unlike lengths in one static batch are not the same work")
        for request in requests:
            request.submit()

            def receive(step: ctranslate2.GenerationStepResult, request: Request = request) -> bool:
                request.receive([step.token_id], time.perf_counter())
                return False

            generator.generate_batch(
                [[vocabulary[token] for token in request.ids]],
                max_length=new_tokens,
                min_length=new_tokens,
                sampling_topk=1,
                beam_size=1,
                include_prompt_in_result=False,
                callback=receive,
            )

    serve(answers, f"ctranslate2 {ctranslate2.__version__} {generator.compute_type}", run)


if __name__ == "__main__":
    main()
