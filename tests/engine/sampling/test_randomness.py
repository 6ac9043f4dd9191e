"""randomness.py and watermark.py: integer definitions, distributions, and detection of a watermark."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from textgen_engine.sampling import randomness, watermark
from textgen_engine.sampling.params import SamplingParams
from textgen_engine.sampling.sampler import Sampler

CPU = torch.device("cpu")
NUM_DRAWS = 20_000
MASK = 2**32 - 1


def word(seed: int, choice: int, position: int, token_id: int) -> int:
    """The random word as plain integers: the definition that every device must follow."""
    value = (randomness.stream_key(seed, choice) + (position + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    value ^= value >> 31
    bits = watermark.mix32(token_id ^ watermark.ID_SALT) ^ (value & MASK)
    bits = (bits * 0x21F0AAAD) & MASK
    bits ^= bits >> 15
    bits = ((bits + (value >> 32)) * 0x735A2D97) & MASK
    return bits ^ (bits >> 16)


def test_noise_is_its_definition_in_integers() -> None:
    seeds = [0, 1, 2**63, 2**64 - 1, 12345]
    vocab = 1000
    keys = np.array([randomness.stream_key(seed, i) for i, seed in enumerate(seeds)], dtype=np.uint64)
    positions = np.array([0, 7, 10**6, 1, 2], dtype=np.int64)
    rows = torch.from_numpy(randomness.row_keys(keys, positions))
    bits = randomness.noise_bits(randomness.hashed_ids(vocab, CPU), rows)
    for i, seed in enumerate(seeds):
        for token_id in (0, 1, 2, 31, 500, 999):
            expected = word(seed, i, int(positions[i]), token_id)
            assert int(bits[i, token_id]) & MASK == expected


def test_known_answers() -> None:
    """Pinned: changing the hash changes the text of every seed in the world."""
    words = [word(0, 0, 0, 0), word(42, 0, 5, 1000), word(2**64 - 1, 3, 10**6, 49151)]
    assert words == [190667297, 360217356, 3060081352]
    green = "".join("01"[watermark.is_green(1, token_id, 0.5)] for token_id in range(16))
    assert green == "1000111111101010"


def test_noise_survives_its_extremes() -> None:
    bits = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        assert randomness.gumbel_noise(bits, dtype).isfinite().all()


def test_noise_is_gumbel() -> None:
    """Kolmogorov-Smirnov distance over ids, and again over positions of one id."""
    over_ids = randomness.noise_bits(randomness.hashed_ids(100_000, CPU), torch.tensor([[17, -99]], dtype=torch.int32))
    keys = np.full(100_000, randomness.stream_key(3, 0), dtype=np.uint64)
    rows = torch.from_numpy(randomness.row_keys(keys, np.arange(100_000)))
    over_positions = randomness.noise_bits(randomness.hashed_ids(7, CPU)[6:], rows)
    for bits in (over_ids, over_positions):
        noise = randomness.gumbel_noise(bits.flatten(), torch.float64).sort().values
        cumulative = torch.exp(-torch.exp(-noise))
        steps = torch.arange(1, len(noise) + 1) / len(noise)
        assert (cumulative - steps).abs().max() < 1.63 / math.sqrt(len(noise))  # 1 % level


def test_noise_of_neighbouring_positions_ids_seeds_and_choices_is_uncorrelated() -> None:
    hashes = randomness.hashed_ids(2000, CPU)

    def noise(seed: int, choice: int) -> Tensor:
        keys = np.full(50, randomness.stream_key(seed, choice), dtype=np.uint64)
        rows = torch.from_numpy(randomness.row_keys(keys, np.arange(50)))
        return randomness.noise_bits(hashes, rows).double()

    base = noise(5, 0)
    others = (noise(6, 0), noise(5, 1))
    pairs = [(base[1:], base[:-1]), (base[:, 1:], base[:, :-1]), (base, others[0]), (base, others[1])]
    for left, right in pairs:
        correlation = torch.corrcoef(torch.stack((left.flatten(), right.flatten())))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(left.numel())


def draws(params: SamplingParams, logits: Tensor, vary: str) -> Tensor:
    """NUM_DRAWS tokens of the same row, differing in seed, position or choice only."""
    sampler = Sampler(vocab_size=len(logits), num_slots=NUM_DRAWS, device=CPU)
    for slot in range(NUM_DRAWS):
        row = dataclasses.replace(params, do_sample=True, seed=slot if vary == "seed" else 7)
        sampler.add(slot, row, choice=slot if vary == "choice" else 0, prompt_ids=[0], output_ids=[])
    positions = range(NUM_DRAWS) if vary == "position" else [0] * NUM_DRAWS
    rows = logits.expand(NUM_DRAWS, -1)
    return sampler.sample(rows, range(NUM_DRAWS), list(positions)).token_ids


def kept(params: SamplingParams, probs: list[float]) -> list[float]:
    """The filters in plain Python: probabilities after them."""

    def normal(values: dict[int, float]) -> dict[int, float]:
        total = sum(values.values())
        return {i: value / total for i, value in values.items()}

    left = normal({i: p ** (1 / params.temperature) for i, p in enumerate(probs)})
    if params.top_k:
        left = normal(dict(sorted(left.items(), key=lambda item: -item[1])[: params.top_k]))
    for p, order in ((params.top_p, "likely"), (params.typical_p, "typical")):
        if p < 1.0:
            entropy = -sum(q * math.log(q) for q in left.values())
            rank = {i: -q if order == "likely" else abs(-math.log(q) - entropy) for i, q in left.items()}
            chosen: dict[int, float] = {}
            for i in sorted(left, key=rank.__getitem__):
                if sum(chosen.values()) < p:
                    chosen[i] = left[i]
            left = normal(chosen)
    if params.min_p:
        left = normal({i: q for i, q in left.items() if q >= params.min_p * max(left.values())})
    return [left.get(i, 0.0) for i in range(len(probs))]


@pytest.mark.parametrize("vary", ["seed", "position", "choice"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=2.0),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.75),
        SamplingParams(typical_p=0.6),
        SamplingParams(min_p=0.15),
        SamplingParams(temperature=1.3, top_k=15, top_p=0.9, typical_p=0.95, min_p=0.05),
    ],
)
def test_tokens_follow_their_distribution(params: SamplingParams, vary: str) -> None:
    logits = torch.randn(24, generator=torch.Generator().manual_seed(4)) * 1.5
    expected = kept(params, logits.double().softmax(-1).tolist())
    counts = torch.bincount(draws(params, logits, vary), minlength=24).tolist()
    possible = [i for i in range(24) if expected[i] > 0]
    assert sum(counts[i] for i in possible) == NUM_DRAWS
    chi_square = sum((counts[i] - NUM_DRAWS * expected[i]) ** 2 / (NUM_DRAWS * expected[i]) for i in possible)
    freedom = len(possible) - 1
    # Wilson and Hilferty 1931: the cube root is nearly normal; 4 standard deviations.
    limit = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit


def test_large_vocabulary_follows_its_distribution() -> None:
    """Ranks of a Zipf-like vocabulary, in groups of similar mass, through the race over all ids."""
    vocab = 5000
    logits = -torch.log(torch.arange(1.0, vocab + 1))
    tokens = draws(SamplingParams(), logits, "seed")
    edges = [0, 1, 2, 4, 9, 20, 45, 100, 250, 600, 1500, vocab]
    probs = logits.double().softmax(-1)
    chi_square = 0.0
    for low, high in itertools.pairwise(edges):
        expected = NUM_DRAWS * float(probs[low:high].sum())
        chi_square += (int(((tokens >= low) & (tokens < high)).sum()) - expected) ** 2 / expected
    assert chi_square < 35.6  # 10 degrees of freedom, one in ten thousand


def test_green_list_in_torch_is_the_plain_one() -> None:
    vocab = 3000
    previous = [0, 1, 2, 999, 2**31 - 1, -1]
    for gamma in (0.1, 0.5, 0.9):
        threshold = watermark.green_threshold(gamma)
        bits = randomness.green_bits(randomness.hashed_ids(vocab, CPU), torch.tensor(previous), threshold)
        assert set(bits.unique().tolist()) <= {0, -1}
        for i, previous_id in enumerate(previous):
            assert (bits[i] == -1).tolist() == [watermark.is_green(previous_id, j, gamma) for j in range(vocab)]
            assert abs((bits[i] == -1).double().mean().item() - gamma) < 4 * math.sqrt(gamma * (1 - gamma) / vocab)


def generate(watermarked: bool, num_tokens: int = 200, vocab: int = 2000) -> list[int]:
    sampler = Sampler(vocab_size=vocab, num_slots=2, device=CPU, watermark_gamma=0.25, watermark_delta=2.0)
    params = SamplingParams(do_sample=True, seed=1, watermark=watermarked)
    sampler.add(0, SamplingParams(watermark=True), choice=0, prompt_ids=[9], output_ids=[])  # a neighbour
    sampler.add(1, params, choice=0, prompt_ids=[5], output_ids=[])
    generator = torch.Generator().manual_seed(0)
    return [
        int(sampler.sample(torch.randn((2, vocab), generator=generator), [0, 1], [i, i]).token_ids[1])
        for i in range(num_tokens)
    ]


def test_a_watermark_is_found_and_plain_text_is_not() -> None:
    assert watermark.z_score([5, *generate(True)], 0.25) > 8
    assert abs(watermark.z_score([5, *generate(False)], 0.25)) < 4
    numbers = random.Random(1)
    assert abs(watermark.z_score([numbers.randrange(2000) for _ in range(2000)], 0.25)) < 4
    assert watermark.z_score([1], 0.5) == 0.0


@pytest.mark.parametrize("gamma", [0.0, 1.0, -1.0, 2.0])
def test_gamma_outside_its_range(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        watermark.green_threshold(gamma)
