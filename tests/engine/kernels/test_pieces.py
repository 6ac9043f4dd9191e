"""kernels/rms_norm.py, rotary_store.py, gated.py and logits.py against their references."""

from __future__ import annotations

import pytest
import torch

from textgen_engine.sampling import randomness

# float32: the order of a sum. bfloat16: its last bit, where rounding falls otherwise.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
TYPES = [torch.float32, torch.bfloat16]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [1, 64, 100, 576])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(device: torch.device, width: int, dtype: torch.dtype, offset: float) -> None:
    from textgen_engine.kernels.rms_norm import rms_norm, rms_norm_reference

    generator = torch.Generator().manual_seed(width)
    x, residual = (torch.randn(3, 2 * width, generator=generator).to(device, dtype)[:, :width] for _ in range(2))
    weight = torch.randn(width, generator=generator).to(device, dtype)
    for added in (None, residual):
        found = rms_norm(x, weight, 1e-5, residual=added, offset=offset)
        expected = rms_norm_reference(x, weight, 1e-5, residual=added, offset=offset)
        close(found[0], expected[0])
        close(found[1], expected[1])  # not equal: Triton's interpreter rounds to bfloat16 towards zero


@pytest.mark.parametrize(
    ("dim", "rotary_dim", "interleaved", "normed"),
    [
        (64, 64, False, False),
        (128, 128, False, True),
        (80, 32, False, False),
        (96, 96, True, False),
        (16, 8, True, True),
        (192, 64, False, True),
    ],
)
@pytest.mark.parametrize("dtype", TYPES)
def test_rotary_store(
    device: torch.device, dim: int, rotary_dim: int, interleaved: bool, normed: bool, dtype: torch.dtype
) -> None:
    from textgen_engine.kernels.rotary_store import rotary_store, rotary_store_reference

    generator = torch.Generator().manual_seed(dim)
    heads, kv_heads, block_size, num_tokens = 3, 2, 4, 5
    qkv = torch.randn(num_tokens, heads + 2 * kv_heads, dim, generator=generator)
    qkv[1, heads + kv_heads, 0], qkv[2, heads + kv_heads, 1] = float("nan"), float("inf")
    angles = torch.randn(num_tokens, rotary_dim, generator=generator)
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    weights = [torch.randn(dim, generator=generator).to(device, dtype) if normed else None for _ in range(2)]
    blocks = torch.tensor([4, 0, 4, 2, 1], device=device)
    offsets = torch.tensor([0, 3, 1, 2, 0], device=device)
    results = []
    for function in (rotary_store, rotary_store_reference):
        given = qkv.to(device, dtype, copy=True)
        keys = torch.full((5, kv_heads, block_size, dim), 7.0, device=device, dtype=dtype)
        values = keys.clone()
        function(
            *(given, cos, sin, keys, values, blocks, offsets),
            num_heads=heads,
            interleaved=interleaved,
            query_norm=weights[0],
            key_norm=weights[1],
        )
        results.append((given[:, : heads + kv_heads], keys, values))
    for found, expected in zip(*results, strict=True):
        close(found, expected)
    assert (results[0][1] == 7.0).sum() >= 15 * kv_heads * dim, "only the tokens' own places are written"
    assert torch.isfinite(results[0][2]).all(), "0 times what a request left behind must be 0"


def test_rotary_store_into_8_bit_floats(device: torch.device) -> None:
    """Quarter turns of numbers that need no rounding, which Triton's interpreter does in a way of its own."""
    from textgen_engine.kernels.rotary_store import rotary_store, rotary_store_reference

    generator = torch.Generator().manual_seed(0)
    qkv = (2.0 ** torch.randint(-4, 11, (3, 4, 16), generator=generator)).to(device)
    cos = torch.tensor([1.0, 0.0, -1.0], device=device)[:, None].expand(3, 16).contiguous()
    sin = torch.tensor([0.0, 1.0, 0.0], device=device)[:, None].expand(3, 16).contiguous()
    blocks = torch.tensor([0, 1, 1], device=device)
    offsets = torch.tensor([1, 0, 2], device=device)
    results = []
    for function in (rotary_store, rotary_store_reference):
        keys = torch.zeros(2, 1, 4, 16, device=device).to(torch.float8_e4m3fn)
        values = keys.clone()
        function(*(qkv.clone(), cos, sin, keys, values, blocks, offsets), num_heads=2, key_scale=0.5, value_scale=2.0)
        results.append((keys.float(), values.float()))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    assert results[0][0].abs().max() == 448, "what does not fit is clamped"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", [1, 96, 1500])
def test_gated(device: torch.device, activation: str, width: int, dtype: torch.dtype) -> None:
    from textgen_engine.kernels.gated import gated, gated_reference

    generator = torch.Generator().manual_seed(width)
    gate_up = (torch.randn(2, 2 * width, generator=generator) * 3).to(device, dtype)
    close(gated(gate_up, activation), gated_reference(gate_up, activation))  # type: ignore[arg-type]


@pytest.mark.parametrize(("vocab_size", "num_words"), [(64, 2), (100, 4), (100, 2), (5000, 157)])
def test_bitmask(device: torch.device, vocab_size: int, num_words: int) -> None:
    from textgen_engine.kernels.logits import apply_bitmask, apply_bitmask_reference

    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(4, vocab_size, generator=generator).to(device)
    bits = torch.randint(-(2**31), 2**31, (2, num_words), generator=generator).to(torch.int32).to(device)
    rows = torch.tensor([3, 1], device=device)
    expected = logits.clone()
    apply_bitmask_reference(expected, rows, bits)
    found = logits.clone()
    apply_bitmask(found, rows, bits)
    assert torch.equal(found, expected)
    assert torch.equal(found[[0, 2]], logits[[0, 2]])


def test_bitmask_equals_the_samplers(device: torch.device) -> None:
    from textgen_engine.kernels.logits import apply_bitmask_reference
    from textgen_engine.sampling.masks import GrammarRows, MaskApplier

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 70, generator=generator)
    bits = torch.randint(-(2**31), 2**31, (2, 3), generator=generator).to(torch.int32)
    rows = torch.tensor([2, 0])
    expected = logits.clone()
    apply_bitmask_reference(expected, rows, bits)
    MaskApplier(torch.device("cpu")).apply(logits, GrammarRows(rows, bits))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("vocab_size", [7, 5000])
def test_race(device: torch.device, vocab_size: int) -> None:
    """Scores agree where it matters, at the top: noise of hopeless tokens may differ by float32's steps."""
    from textgen_engine.kernels.logits import race_scores, race_scores_reference

    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(3, vocab_size, generator=generator) * 2).to(device)
    logits[1, ::2] = -torch.inf
    hashes = randomness.hashed_ids(vocab_size, device)
    keys = torch.randint(-(2**31), 2**31, (3, 2), generator=generator).to(torch.int32).to(device)
    temperature = torch.tensor([[1.0], [0.3], [2.5]], dtype=torch.float64, device=device)
    top = logits.amax(-1, keepdim=True)
    found = race_scores(logits, top, temperature, hashes, keys)
    expected = race_scores_reference(logits, top, temperature, hashes, keys)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
