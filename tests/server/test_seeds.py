"""The same seed gives the same sampled text, whoever comes and goes beside it. (After a restart: test_supervision.)"""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .wire import Wire

SEEDED: dict[str, Any] = {
    "text_input": "Once upon a time, in a small village by the sea,",
    "stream": True,
    "sampling_parameters": {"max_new_tokens": 24, "temperature": 1.0, "top_k": 200, "top_p": 0.98, "seed": 4711},
}
NUM_NEIGHBOURS = 16


def _keep_joining_and_leaving(wire: Wire, seed: int, stop: threading.Event) -> None:
    """One neighbour after the other, of many lengths and kinds; every third leaves in the middle."""
    draw = random.Random(seed)
    while not stop.is_set():
        sampling = {"max_new_tokens": draw.randint(1, 12), "temperature": draw.choice([0.5, 1.0, 2.0])}
        text = " ".join(draw.choice(["sea", "ship", "wind", "salt", "gull"]) for _ in range(draw.randint(1, 40)))
        call = wire.open(text_input=text, stream=True, sampling_parameters=sampling)
        if draw.random() < 0.3:
            next(call)
            call.cancel()
        else:
            assert [response.error for response in call].count(None) > 0


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(wire: Wire) -> None:
    alone = wire.ask(**SEEDED).text
    assert len(alone) > 40
    stop = threading.Event()
    neighbours = [
        threading.Thread(target=_keep_joining_and_leaving, args=(wire, seed, stop)) for seed in range(NUM_NEIGHBOURS)
    ]
    for neighbour in neighbours:
        neighbour.start()
    try:
        waiting = [wire.ask_soon(**SEEDED), wire.ask_soon(**SEEDED | {"stream": False})]
        crowded = [outcome.result().text for outcome in waiting]
    finally:
        stop.set()
        for neighbour in neighbours:
            neighbour.join()
    assert crowded == [alone, alone]


def test_different_seeds_and_choices_give_different_texts(wire: Wire) -> None:
    sampling = SEEDED["sampling_parameters"]
    asked = [wire.ask_soon(**SEEDED | {"sampling_parameters": sampling | {"seed": seed}}) for seed in range(6)]
    texts = {outcome.result().text for outcome in asked}
    assert len(texts) == 6
    [response] = wire.ask(**SEEDED | {"stream": False, "sampling_parameters": sampling | {"n": 2}}).responses
    first, second = response.tensors["text_output"]
    assert first != second
    assert first == wire.ask(**SEEDED).text, "choice 0 of two is the text of one"


def test_identical_requests_at_once_do_not_differ(wire: Wire) -> None:
    """They share a prefix, slots and steps in every possible way."""
    texts = {waiting.result().text for waiting in [wire.ask_soon(**SEEDED) for _ in range(12)]}
    assert len(texts) == 1
