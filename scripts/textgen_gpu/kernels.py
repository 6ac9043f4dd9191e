"""Every kernel against its reference: on the GPU at real sizes, in Triton's interpreter at tiny ones."""

from __future__ import annotations

from typing import Any

import torch

from textgen_engine.attention.base import Scoring
from textgen_engine.models.quantization.bitsandbytes_4bit import FourBit
from textgen_engine.models.quantization.eetq import WeightOnlyInt8
from textgen_engine.models.quantization.fp8 import Fp8AtLoad
from textgen_engine.models.quantization.linear import CodedLinear
from textgen_engine.models.quantization.method import LoadMethod
from textgen_engine.sampling import randomness
from textgen_gpu.checks import Run

_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def check_kernels(run: Run, device: torch.device) -> None:
    """Adds one check per kernel, type and shape."""
    is_real = device.type == "cuda"
    types = [torch.float32, torch.float16, torch.bfloat16] if is_real else [torch.float32]
    _check_decode(run, device, types, is_real=is_real)
    _check_pieces(run, device, types, is_real=is_real)
    _check_coded(run, device, types, is_real=is_real)


def _check_coded(run: Run, device: torch.device, types: list[torch.dtype], *, is_real: bool) -> None:
    """Quantized linear layers beside their dequantizing form."""
    from textgen_engine.kernels.coded_linear import coded_linear

    methods: list[LoadMethod] = [WeightOnlyInt8("eetq"), Fp8AtLoad(), FourBit("bitsandbytes-nf4")]
    num_outputs, num_inputs = (4096, 4096) if is_real else (40, 128)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * 0.02
    for method in methods:
        layer = method.replacement(torch.nn.Linear(num_inputs, num_outputs, bias=False, device="meta"), "layer")
        assert isinstance(layer, CodedLinear)
        layer.fill(**method.quantize(weight)).to(device)
        layer.bring(device)
        for dtype in types:
            for num_rows in (1, 16, 64) if is_real else (3,):
                x = torch.randn(num_rows, num_inputs, generator=generator).to(device, dtype)
                layer.gpu_kernel = None
                expected = layer(x)
                layer.gpu_kernel = coded_linear
                run.compare(
                    f"{method.name} weights, {num_rows} rows {_short(dtype)}", layer(x), expected, _ALLOWED[dtype]
                )


def _check_decode(run: Run, device: torch.device, types: list[torch.dtype], *, is_real: bool) -> None:
    from textgen_engine.kernels.paged_decode import paged_decode, paged_decode_reference

    lengths = [1, 17, 300, 4097, 1000] if is_real else [1, 17, 40]
    dims = [64, 80, 96, 128, 192, 256] if is_real else [64, 80]
    ratios = [(8, 8), (32, 8), (14, 2), (71, 1)] if is_real else [(4, 2)]
    plain: dict[str, Any] = {}
    narrow_type = types[-1]
    cases = [(dtype, dim, ratios[-1 if dim == 64 else 0], 16, plain) for dtype in types for dim in dims]
    cases += [(narrow_type, 64, heads, 16, plain) for heads in ratios]
    cases += [(narrow_type, 64, ratios[0], block, plain) for block in (1, 64, 256)]
    some = torch.linspace(-1, 1, ratios[0][0], device=device)
    for options in (
        {"sliding_window": 100},
        {"soft_cap": 20.0},
        {"chunk_size": 64},
        {"sinks": some},
        {"alibi_slopes": some.abs() * 0.1},
        {"sliding_window": 128, "soft_cap": 30.0, "sinks": some},
    ):
        cases += [(dtype, 64, ratios[0], 16, options) for dtype in types]
    for dtype, dim, (heads, kv_heads), block_size, options in cases:
        cache = _cache(lengths, heads, kv_heads, dim, block_size, dtype, dtype, device)
        for num_runs in (1, 8) if is_real else (2,):
            scoring = Scoring(dim**-0.5, **options)
            found = paged_decode(*cache, scoring, num_runs=num_runs)
            name = f"paged decode {_short(dtype)} dim {dim} heads {heads}/{kv_heads} block {block_size} runs {num_runs}"
            name += f" {' '.join(options)}" if options else ""
            run.compare(name, found, paged_decode_reference(*cache, scoring), _ALLOWED[dtype])
    narrow = [torch.float8_e5m2]
    if not is_real or torch.cuda.get_device_capability(device) >= (8, 9):
        narrow.append(torch.float8_e4m3fn)
    for cache_dtype in narrow:
        cache = _cache(lengths, 8, 2, 64, 16, torch.bfloat16, cache_dtype, device)
        found = paged_decode(*cache, Scoring(0.125), num_runs=2, key_scale=0.5, value_scale=2.0)
        expected = paged_decode_reference(*cache, Scoring(0.125), key_scale=0.5, value_scale=2.0)
        run.compare(f"paged decode, cache of {_short(cache_dtype)}", found, expected, 2e-2)


def _cache(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, keys, values, block tables and lengths; blocks lie in a random order."""
    generator = torch.Generator(device).manual_seed(dim + heads)
    most = -(-max(lengths) // block_size)
    tables = torch.randperm(most * len(lengths), generator=generator, device=device).view(len(lengths), most)
    shape = (most * len(lengths), kv_heads, block_size, dim)
    keys, values = (torch.randn(shape, generator=generator, device=device).to(cache_dtype) for _ in range(2))
    query = torch.randn(len(lengths), heads, dim, generator=generator, device=device).to(dtype)
    return query, keys, values, tables, torch.tensor(lengths, dtype=torch.int32, device=device)


def _check_pieces(run: Run, device: torch.device, types: list[torch.dtype], *, is_real: bool) -> None:
    from textgen_engine.kernels.gated import gated, gated_reference
    from textgen_engine.kernels.logits import (
        apply_bitmask,
        apply_bitmask_reference,
        race_scores,
        race_scores_reference,
    )
    from textgen_engine.kernels.rms_norm import rms_norm, rms_norm_reference
    from textgen_engine.kernels.rotary_store import rotary_store, rotary_store_reference

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    rows = 33 if is_real else 2
    for dtype in types:
        for width in (64, 1000, 4096, 8192) if is_real else (64, 100):
            x, residual, weight = random(rows, width).to(dtype), random(rows, width).to(dtype), random(width).to(dtype)
            found = rms_norm(x, weight, 1e-5, residual=residual)[0]
            expected = rms_norm_reference(x, weight, 1e-5, residual=residual)[0]
            run.compare(f"RMSNorm with residual {_short(dtype)} width {width}", found, expected, _ALLOWED[dtype])
            for activation in ("silu", "gelu", "gelu_tanh"):
                both = random(rows, 2 * width).to(dtype)
                found, expected = gated(both, activation), gated_reference(both, activation)
                run.compare(f"{activation} gate {_short(dtype)} width {width}", found, expected, _ALLOWED[dtype])
        for dim, rotary in ((64, 64), (128, 128), (96, 32), (256, 256)) if is_real else ((64, 32),):
            heads, kv_heads = 8, 2
            qkv = random(rows, heads + 2 * kv_heads, dim).to(dtype)
            angles = random(rows, rotary)
            norms = [random(dim).to(dtype) for _ in range(2)]
            results = []
            for function in (rotary_store, rotary_store_reference):
                given = qkv.clone()
                keys, values = (torch.zeros(rows, kv_heads, 16, dim, device=device, dtype=dtype) for _ in range(2))
                places = torch.arange(rows, device=device)
                function(
                    *(given, angles.cos().to(dtype), angles.sin().to(dtype), keys, values, places, places % 16),
                    num_heads=heads,
                    query_norm=norms[0],
                    key_norm=norms[1],
                )
                results.append(torch.cat((given[:, : heads + kv_heads].flatten(), keys.flatten(), values.flatten())))
            run.compare(
                f"rotary and store {_short(dtype)} dim {dim} of {rotary}", results[0], results[1], _ALLOWED[dtype]
            )
    vocab = 128_257 if is_real else 500
    logits = random(rows, vocab)
    bits = torch.randint(-(2**31), 2**31, (rows - 1, -(-vocab // 32)), generator=generator).to(torch.int32).to(device)
    masked = [logits.clone(), logits.clone()]
    for function_, target in zip((apply_bitmask, apply_bitmask_reference), masked, strict=True):
        function_(target, torch.arange(1, rows, device=device), bits)
    kept = [one.masked_fill(torch.isneginf(one), -100.0) for one in masked]
    run.compare("grammar mask", kept[0], kept[1], 0.0)
    keys = torch.randint(-(2**31), 2**31, (rows, 2), generator=generator).to(torch.int32).to(device)
    temperature = torch.full((rows, 1), 0.7, dtype=torch.float64, device=device)
    hashes = randomness.hashed_ids(vocab, device)
    top = logits.amax(-1, keepdim=True)
    scores = [one(logits, top, temperature, hashes, keys) for one in (race_scores, race_scores_reference)]
    run.compare("race of free rows", scores[0], scores[1], 1e-4)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
