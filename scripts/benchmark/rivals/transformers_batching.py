"""transformers' continuous batching (a paged cache, PyTorch's attention) behind rival_protocol.py."""

from __future__ import annotations

import time

from rival_protocol import Request, parser, serve, take_over_stdout


def main() -> None:
    """Load, then answer."""
    given = parser(__doc__).parse_args()
    answers = take_over_stdout()
    import torch
    import transformers
    from transformers import ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(given.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        given.model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=64, eos_token_id=-1, pad_token_id=2),
        continuous_batching_config=ContinuousBatchingConfig(
            allow_block_sharing=False, page_size=256, num_blocks=160, max_batch_tokens=1024
        ),
    )
    manager.start()
    number = 0

    def run(requests: list[Request], concurrency: int, new_tokens: int) -> None:
        nonlocal number
        waiting = requests[::-1]
        live: dict[str, Request] = {}
        while waiting or live:
            while waiting and len(live) < concurrency:
                request = waiting.pop()
                request.submit()
                number += 1
                live[f"r{number}"] = request
                manager.add_request(
                    request.ids, request_id=f"r{number}", max_new_tokens=new_tokens, streaming=True, eos_token_id=-1
                )
            output = manager.get_result(timeout=300)
            if output is None or output.error:
                raise RuntimeError(f"continuous batching stopped: {output and output.error}")
            now = time.perf_counter()
            request = live.get(output.request_id)
            if request is None:
                continue
            request.receive(list(output.generated_tokens)[len(request.token_ids) :], now)
            if output.is_finished():
                del live[output.request_id]

    serve(answers, f"transformers {transformers.__version__}", run)


if __name__ == "__main__":
    main()
