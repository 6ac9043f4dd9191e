"""Cases 53 and 54: a prefix that was computed before is not computed again, and changes no token."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .asking import ids_of, together, wait_until

if TYPE_CHECKING:
    from textgen_client import Client, Generation

    from ..running_server import RunningServer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "stream",
    "of",
    "tokens",
    "becomes",
    "text",
]


def cached_tokens(answer: Generation) -> int:
    assert answer.details is not None
    count: int = answer.details["cached_tokens"]
    return count


def test_case_53_long_prefix_twice(tiny_server: RunningServer, tiny_client: Client) -> None:
    """The same prefix of 4,000 tokens twice, and with another end: same ids, and next to nothing computed again."""
    rng = random.Random(53)
    prefix = [rng.randrange(2, 500) for _ in range(4000)]

    def computed() -> float:
        return tiny_server.metric("tgi_prefill_tokens")

    def ask(ids: list[int]) -> tuple[Generation, float]:
        before = computed()
        answer = tiny_client.generate(input_ids=ids, max_new_tokens=16, details=True)
        # Metrics follow within 0.2 s. At least the last token of a prompt is always computed.
        wait_until(lambda: computed() + cached_tokens(answer) >= before + len(ids) - 1, "the prompt is counted")
        return answer, computed() - before

    wait_until(lambda: computed() > 0, "the probe with which every server starts is counted")
    first, work = ask(prefix)
    assert (cached_tokens(first), work) == (0, 4000)
    again, work = ask(prefix)
    assert ids_of(again) == ids_of(first)
    assert cached_tokens(again) >= 4000 - 32 and work <= 32
    # Another end after the same prefix: its own tokens, computed from the shared ones.
    tail = [rng.randrange(2, 500) for _ in range(40)]
    other, work = ask(prefix + tail)
    assert cached_tokens(other) >= 4000 - 16 and work <= 40 + 32
    whole = tiny_client.generate(input_ids=prefix + tail, max_new_tokens=16, decoder_input_details=True)
    assert cached_tokens(whole) == 0, "scoring a prompt computes all of it"
    assert ids_of(whole) == ids_of(other) != ids_of(first)
    assert again.details is not None and first.details is not None
    assert again.details["timings"]["inference_time"] < first.details["timings"]["inference_time"]


def test_case_54_hundred_chats_cached_and_not(tiny_client: Client, plain_client: Client) -> None:
    """100 mixed chats at once with the prefix cache on equal the same chats one by one with it off."""
    rng = random.Random(54)
    systems = [" ".join(rng.choices(WORDS, k=length)) for length in (0, 8, 40, 90)]
    chats: list[list[dict[str, str]]] = []
    for number in range(100):
        system = rng.choice(systems)
        chat = [{"role": "system", "content": system}] if system else []
        for turn in range(rng.randrange(3)):
            chat += [
                {"role": "user", "content": " ".join(WORDS[turn : turn + 6])},
                {"role": "assistant", "content": " ".join(WORDS[turn + 3 : turn + 9])},
            ]
        chats.append([*chat, {"role": "user", "content": " ".join(rng.choices(WORDS, k=1 + number % 12))}])

    def ask(client: Client, number: int) -> Callable[[], Generation]:
        seeded: dict[str, Any] = {"temperature": 0.8, "seed": number} if number % 3 == 0 else {}
        return lambda: client.generate(messages=chats[number], max_new_tokens=8, details=True, **seeded)

    cached = together(*(ask(tiny_client, number) for number in range(100)))
    plain = together(*(ask(plain_client, number) for number in range(100)))
    assert sum(cached_tokens(answer) > 0 for answer in cached) > 50
    assert sum(cached_tokens(answer) for answer in plain) == 0
    assert [ids_of(answer) for answer in cached] == [ids_of(answer) for answer in plain]
    assert [answer.text for answer in cached] == [answer.text for answer in plain]
    assert len({tuple(ids_of(answer)) for answer in cached}) > 60
