"""Where all layers see a sliding window, KV blocks behind it are given back: bounded memory, the same texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from textgen_engine.block_manager import BlockManager
from textgen_engine.request import GenerationRequest
from textgen_engine.sequence import Sequence

from .test_engine_equalities import generate, ids_of, prompts_of
from .tiny import Harness, make_request

NewEngine = Callable[..., Harness]
PROMPTS = prompts_of([5, 40, 1, 100, 17])
NUM_TOKENS = 40
WINDOW, BLOCK = 8, 4
# Window and block borders, the block written to, and the step's chunk.
MOST_BLOCKS = WINDOW // BLOCK + 2


@pytest.fixture(scope="module", params=["mistral", "starcoder2"])
def family(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Path:
    folder: Path = checkpoint(request.param)
    return folder


def requests_of(prefix: str) -> list[GenerationRequest]:
    return [make_request(f"{prefix}{row}", prompt, NUM_TOKENS) for row, prompt in enumerate(PROMPTS)]


def test_memory_stays_that_of_the_window(family: Path, new_engine: NewEngine) -> None:
    harness = new_engine(family, block_size=BLOCK, tokens_per_step=16, max_sequences=4, prefix_caching=False)
    blocks = harness.engine._rooms.blocks
    request = make_request("long", PROMPTS[3], 200, ignore_eos_token=True)
    harness.submit(request)
    most = 0
    while not harness.answers["long"].num_last:
        harness.step()
        most = max(most, blocks.num_used)
    assert most <= MOST_BLOCKS + 16 // BLOCK, "one chunk of a prompt, or one token"
    assert blocks.num_used == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens_per_step": 16, "max_sequences": 16},
        {"num_blocks": 48, "max_total_tokens": 150},
        {"guesses": 3, "prefix_caching": False},
        {"overlap": True, "tokens_per_step": 32, "max_sequences": 16},
    ],
    ids=["whole", "chunked", "tight", "guesses", "overlapping steps"],
)
def test_texts_are_those_of_transformers(family: Path, new_engine: NewEngine, options: dict[str, int]) -> None:
    """Twice, so that the second time finds the first one's blocks, those given back included."""
    expected = generate(family, PROMPTS, NUM_TOKENS)
    harness = new_engine(family, block_size=BLOCK, **options)
    assert ids_of(harness.run(requests_of("r"))) == expected
    answers = harness.run(requests_of("again"))
    assert ids_of(answers) == expected
    if not options:
        assert answers["again3"].outputs[0].num_cached_tokens == 96


def test_choices_share_what_is_left(family: Path, new_engine: NewEngine) -> None:
    request = make_request("choices", PROMPTS[1], 30, ignore_eos_token=True, n=3, best_of=3)
    harness = new_engine(family, block_size=BLOCK)
    answer = harness.run_alone(request)
    assert answer.ids(0) == answer.ids(1) == answer.ids(2)


def test_models_with_one_full_layer_keep_all(checkpoint: Callable[[str], Path], new_engine: NewEngine) -> None:
    harness = new_engine(checkpoint("gemma3"), block_size=BLOCK, prefix_caching=False)
    harness.submit(make_request("r", PROMPTS[3], 20, ignore_eos_token=True))
    harness.step(10)
    assert harness.engine._rooms.blocks.num_used >= 100 // BLOCK


def test_given_back_blocks_are_found_by_their_hash() -> None:
    blocks = BlockManager(16, BLOCK, window=WINDOW)
    request = make_request("r", list(range(20)), 4)
    first, second = Sequence(request), Sequence(request)
    assert blocks.reserve(first, 20) == []
    first.num_computed = 20
    blocks.register(first)
    blocks.release_hidden(first)
    blocks.check_integrity([first])
    assert first.num_released_blocks == 3, "token 20 sees 13 to 20"
    assert first.block_table[:4] == [first.block_table[3]] * 4
    found = blocks.find_prefix(second)
    assert len(found) == 4 and len(set(found)) == 4
    blocks.adopt_prefix(second, found)
    blocks.release(first)
    blocks.check_integrity([second])
    blocks.release(second)
    assert blocks.num_used == 0
