"""OpenVINO GenAI's ContinuousBatchingPipeline behind rival_protocol.py."""

from __future__ import annotations

import time
from typing import Any

from rival_protocol import Request, parser, serve, take_over_stdout


def main() -> None:
    """Load, then answer."""
    arguments = parser(__doc__)
    arguments.add_argument("--batch-tokens", type=int, default=1024)
    arguments.add_argument("--precision", help="of the arithmetic; OpenVINO's own choice is bf16 where it is native")
    arguments.add_argument("--dynamic-quantization-group-size")
    given = arguments.parse_args()
    answers = take_over_stdout()
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 4
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = given.batch_tokens
    scheduler.max_num_seqs = 64
    scheduler.dynamic_split_fuse = True
    properties = {"INFERENCE_NUM_THREADS": given.threads}
    if given.precision:
        properties["INFERENCE_PRECISION_HINT"] = given.precision
    if given.dynamic_quantization_group_size:
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = given.dynamic_quantization_group_size
    pipeline = genai.ContinuousBatchingPipeline(given.model, scheduler, "CPU", properties)
    number = 0

    def run(requests: list[Request], concurrency: int, new_tokens: int) -> None:
        nonlocal number
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        waiting = requests[::-1]
        live: dict[int, tuple[Request, Any]] = {}
        while waiting or live:
            while waiting and len(live) < concurrency:
                request = waiting.pop()
                request.submit()
                number += 1
                ids = openvino.Tensor(np.array([request.ids], dtype=np.int64))
                live[number] = (request, pipeline.add_request(number, ids, config))
            pipeline.step()
            now = time.perf_counter()
            for key, (request, handle) in list(live.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        request.receive([int(token) for token in output.generated_ids], now)
                if len(request.token_ids) >= new_tokens:
                    del live[key]
        while pipeline.has_non_finished_requests():
            pipeline.step()

    serve(answers, f"openvino-genai {genai.__version__}", run)


if __name__ == "__main__":
    main()
