"""attention/flash.py, choice.py and libraries.py without a GPU.

The libraries are emulated from their documentation: functions of the same signature that read what they are given (cu_
seqlens, block tables, lengths, windows) and compute densely. So a wrong number in the metadata gives a wrong result.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from textgen_engine.attention.base import AttentionFeatures, Scoring
from textgen_engine.attention.choice import choose
from textgen_engine.attention.flash import FlashBackend, GpuTraits, PagedKernel
from textgen_engine.attention.libraries import (
    FlashAttention2,
    FlashAttention3,
    FlashAttention4,
    Need,
    Spans,
    TorchVarlen,
    VarlenLibrary,
    find_libraries,
)
from textgen_engine.attention.library_trial import try_library

from .test_sdpa import TOLERANCE, Step, dense, make_step

HOPPER = GpuTraits((9, 0), 132)


def varlen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cu_q: torch.Tensor,
    lengths: list[int],
    tables: torch.Tensor | None,
    *,
    scale: float,
    window: tuple[int | None, int] = (-1, -1),
    soft_cap: float = 0.0,
    slopes: torch.Tensor | None = None,
    chunk: int = 0,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention one sequence at a time; keys lie behind one another, or in pages [num_pages, page, heads, dim]."""
    output = query.new_empty(*query.shape[:2], values.shape[-1])
    log_sums = query.new_empty(query.shape[1], query.shape[0])
    start_k = 0
    for index, length in enumerate(lengths):
        begin, end = int(cu_q[index]), int(cu_q[index + 1])
        if tables is None:
            k, v = keys[start_k : start_k + length], values[start_k : start_k + length]
            start_k += length
        else:
            pages = tables[index, : -(-length // keys.shape[1])].long()
            k, v = (cache[pages].flatten(0, 1)[:length] for cache in (keys, values))
        ratio = query.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(ratio, dim=1) for tensor in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[begin:end], k) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        rows = torch.arange(end - begin)[:, None] + length - (end - begin)
        places = torch.arange(length)[None]
        if slopes is not None:
            scores = scores - slopes[:, None, None] * (rows - places).abs()
        hidden = torch.zeros(end - begin, length, dtype=torch.bool)
        if causal or window[1] == 0:
            hidden |= places > rows
        if window[0] not in (-1, None):
            hidden |= places < rows - window[0]
        if chunk:
            hidden |= places < rows // chunk * chunk
        scores = scores.masked_fill(hidden, -math.inf)
        log_sums[:, begin:end] = torch.logsumexp(scores, -1)
        output[begin:end] = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v)
    return output, log_sums


def spans(cu: torch.Tensor) -> list[int]:
    assert cu.dtype is torch.int32 and cu[0] == 0
    return cu.diff().tolist()


class Flash2:
    """The module flash_attn."""

    def flash_attn_varlen_func(
        self, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1),
        softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False,
        block_table: Any = None,
    ) -> Any:  # fmt: skip
        assert block_table is None or (block_table.dtype is torch.int32 and k.shape[1] % 256 == 0)
        assert max(spans(cu_seqlens_q)) <= max_seqlen_q and max(spans(cu_seqlens_k)) <= max_seqlen_k
        found = varlen(
            q, k, v, cu_seqlens_q, spans(cu_seqlens_k), block_table, scale=softmax_scale, window=window_size,
            soft_cap=softcap, slopes=alibi_slopes, causal=causal,
        )  # fmt: skip
        return (*found, None) if return_attn_probs else found[0]


class Flash3:
    """The module flash_attn_interface."""

    def flash_attn_varlen_func(
        self, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
        seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None, causal: bool = False, qv: Any = None,
        window_size: Any = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
        return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        found = varlen(
            q, k, v, cu_seqlens_q, spans(cu_seqlens_k), None, scale=softmax_scale, window=window_size,
            soft_cap=softcap, chunk=attention_chunk, causal=causal,
        )  # fmt: skip
        return found if return_attn_probs else found[0]

    def flash_attn_with_kvcache(
        self, q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, cache_seqlens: Any = None,
        page_table: Any = None, cu_seqlens_q: Any = None, max_seqlen_q: Any = None, softmax_scale: Any = None,
        causal: bool = False, window_size: Any = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0,
        return_softmax_lse: bool = False,
    ) -> Any:  # fmt: skip
        assert page_table.dtype is torch.int32 and cache_seqlens.dtype is torch.int32
        assert max(spans(cu_seqlens_q)) <= max_seqlen_q
        found = varlen(
            q, k_cache, v_cache, cu_seqlens_q, cache_seqlens.tolist(), page_table, scale=softmax_scale,
            window=window_size, soft_cap=softcap, chunk=attention_chunk, causal=causal,
        )  # fmt: skip
        return found if return_softmax_lse else found[0]


class Flash4:
    """The module flash_attn.cute."""

    def flash_attn_varlen_func(
        self, q: Any, k: Any, v: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None,
        max_seqlen_k: Any = None, softmax_scale: Any = None, causal: bool = False, window_size: Any = (None, None),
        learnable_sink: Any = None, softcap: float = 0.0, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        return varlen(
            q, k, v, cu_seqlens_q, spans(cu_seqlens_k), None, scale=softmax_scale, window=window_size,
            soft_cap=softcap, causal=causal,
        )  # fmt: skip


class Torch:
    """The module torch.nn.attention.varlen."""

    AuxRequest = SimpleNamespace

    def varlen_attn(
        self, query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
        return_aux: Any = None, scale: Any = None, window_size: Any = (-1, -1), enable_gqa: bool = False,
        seqused_k: Any = None, block_table: Any = None, num_splits: Any = None,
    ) -> Any:  # fmt: skip
        assert enable_gqa or query.shape[1] == key.shape[-2]
        assert (block_table is None) == (seqused_k is None)
        lengths = spans(cu_seq_k) if seqused_k is None else seqused_k.tolist()
        found = varlen(
            query, key, value, cu_seq_q, lengths, block_table, scale=scale, window=window_size,
            causal=window_size[1] == 0,
        )  # fmt: skip
        return found if return_aux is not None else found[0]


class _AnyType(VarlenLibrary):
    """Emulations know no 16-bit floats only."""

    def lacks(self, need: Need) -> str | None:
        return super().lacks(replace(need, dtype=torch.bfloat16))


def emulated(kind: type[VarlenLibrary], module: Any) -> VarlenLibrary:
    mixed = type(kind.__name__, (_AnyType, kind), {"name": kind.name})
    library: VarlenLibrary = mixed(module)  # type: ignore[call-arg]
    return library


EMULATED = {
    "flash2": lambda: emulated(FlashAttention2, Flash2()),
    "flash3": lambda: emulated(FlashAttention3, Flash3()),
    "flash4": lambda: emulated(FlashAttention4, Flash4()),
    "torch": lambda: emulated(TorchVarlen, Torch()),
}
# Decodes, guesses of one sequence among them, then chunks with and without a prefix.
MIXED = [(1, 1), (1, 37), (1, 300), (5, 5), (3, 20), (40, 300)]
FRESH = [(1, 9), (4, 4), (30, 30)]


def paged_kernel() -> PagedKernel:
    from textgen_engine.kernels.paged_decode import choose_num_runs, paged_decode_reference

    return PagedKernel(paged_decode_reference, choose_num_runs)


def run(step: Step, scoring: Scoring, backend: FlashBackend) -> torch.Tensor:
    backend.prepare(step.metadata)
    return backend.run(0, step.query, step.key, step.value, step.metadata, scoring)


@pytest.mark.parametrize("name", EMULATED)
@pytest.mark.parametrize("block_size", [4, 256])
@pytest.mark.parametrize("lengths", [MIXED, FRESH, MIXED[:3], MIXED[3:]], ids=["mixed", "fresh", "decodes", "chunks"])
def test_metadata_of_every_library(name: str, block_size: int, lengths: list[tuple[int, int]]) -> None:
    """Plain, with a window, and with sinks, that each of them can be given."""
    backend = FlashBackend(HOPPER, [EMULATED[name]()], paged_kernel())
    for options in ({}, {"sliding_window": 7}, {"sinks": torch.tensor([0.5, -2.0, 3.0, 0.0])}):
        step = make_step(lengths, heads=4, kv_heads=2, block_size=block_size)
        scoring = Scoring(0.25, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(run(step, scoring, backend), dense(step, scoring).float(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "options", [{"soft_cap": 2.0}, {"chunk_size": 16}, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])}], ids=str
)
@pytest.mark.parametrize("name", EMULATED)
def test_what_a_library_lacks_is_done_otherwise(name: str, options: dict[str, Any]) -> None:
    backend = FlashBackend(HOPPER, [EMULATED[name]()], paged_kernel())
    step = make_step(MIXED, heads=4, kv_heads=2)
    scoring = Scoring(0.25, **options)
    torch.testing.assert_close(run(step, scoring, backend), dense(step, scoring).float(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("forced", ["auto", "sdpa", "paged", "torch"])
def test_without_kernel_or_library(forced: str) -> None:
    step = make_step(MIXED, heads=4, kv_heads=2, value_dim=24)
    scoring = Scoring(0.25)
    for kernel in (None, paged_kernel()):
        backend = FlashBackend(HOPPER, [EMULATED["torch"]()], kernel, forced=forced)
        torch.testing.assert_close(run(step, scoring, backend), dense(step, scoring).float(), atol=TOLERANCE, rtol=0)


def test_an_8_bit_cache() -> None:
    """Chunks see what later chunks will see; the emulation's keys are those of the cache."""
    step = make_step(MIXED, heads=4, kv_heads=2, stale=100.0)
    for name in ("keys", "values"):
        setattr(step.metadata, name, [cache.to(torch.float8_e4m3fn) for cache in getattr(step.metadata, name)])
    reference = FlashBackend(HOPPER, [], None, forced="sdpa")
    expected = run(step, Scoring(0.25), reference)
    found = run(step, Scoring(0.25), FlashBackend(HOPPER, [EMULATED["flash2"]()], paged_kernel()))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


# ---- the choice ----------------------------------------------------------------------------------------------------

ALL = [FlashAttention4(Flash4()), FlashAttention3(Flash3()), FlashAttention2(Flash2()), TorchVarlen(Torch())]


def need(**changes: Any) -> Need:
    features = AttentionFeatures(**changes.pop("features", {}))
    settings: dict[str, Any] = {
        "capability": (9, 0), "dtype": torch.bfloat16, "cache_dtype": torch.bfloat16, "head_dim": 128,
        "value_dim": 128, "block_size": 16, "features": features,
    }  # fmt: skip
    return Need(**{**settings, **changes})


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        (need(), "flash4 for prompts, flash3 (paged) for decodes"),
        (need(head_dim=256, value_dim=256), "flash3 (paged) for prompts, flash3 (paged) for decodes"),
        (need(capability=(8, 0)), "flash2 for prompts, paged for decodes"),
        (need(capability=(8, 0), block_size=256), "flash2 (paged) for prompts, flash2 (paged) for decodes"),
        (need(capability=(10, 0)), "flash4 for prompts, paged for decodes"),
        (need(capability=(7, 5)), "sdpa for prompts, paged for decodes"),
        (need(dtype=torch.float32, cache_dtype=torch.float32), "sdpa for prompts, paged for decodes"),
        (need(cache_dtype=torch.float8_e4m3fn), "flash4 for prompts, paged for decodes"),
        (
            need(cache_dtype=torch.float8_e4m3fn, capability=(8, 0)),
            "flash2 for prompts, sdpa for decodes",
        ),
        (need(head_dim=192), "sdpa for prompts, paged for decodes"),
        (need(features={"alibi": True}), "flash2 for prompts, paged for decodes"),
        (need(features={"chunks": True}), "flash3 (paged) for prompts, flash3 (paged) for decodes"),
        (need(features={"sinks": True, "sliding_window": True}), "flash4 for prompts, flash3 (paged) for decodes"),
    ],
)
def test_choice(needed: Need, expected: str) -> None:
    line = str(choose(needed, ALL, has_kernel=True))
    assert line.removeprefix("attention: ").partition(" (flash")[0].startswith(expected), line


def test_the_line_says_why_the_others_fell_out() -> None:
    line = str(choose(need(capability=(8, 0)), ALL[1:], has_kernel=True, absent=("flash4: not installed",)))
    assert "flash4: not installed" in line and "flash3: needs compute capability 9.0" in line
    assert "flash2 for decodes: blocks of 16 tokens, not of a multiple of 256" in line


def test_a_forced_choice() -> None:
    assert choose(need(), ALL, has_kernel=True, forced="torch").prefill is ALL[3]
    assert choose(need(), ALL, has_kernel=True, forced="paged").paged_kernel
    plain = choose(need(), ALL, has_kernel=True, forced="sdpa")
    assert plain.prefill is None and plain.decode is None and not plain.fits_graphs


@pytest.mark.parametrize("kind", [TorchVarlen, FlashAttention3, FlashAttention4])
def test_older_versions_without_their_switches(kind: type[VarlenLibrary]) -> None:
    """PyTorch's took grouped heads before it had a switch for them; flash-attn's gave log-sums without being asked."""

    class OldTorch(Torch):
        def varlen_attn(  # type: ignore[override]
            self, query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
            return_aux: Any = None, scale: Any = None, window_size: Any = (-1, -1),
        ) -> Any:  # fmt: skip
            return Torch.varlen_attn(
                self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale,
                window_size=window_size, enable_gqa=True,
            )  # fmt: skip

    class OldFlash:
        def flash_attn_varlen_func(
            self, q: Any, k: Any, v: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None,
            max_seqlen_k: Any = None, softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1),
            softcap: float = 0.0, attention_chunk: int = 0,
        ) -> Any:  # fmt: skip
            return Flash4.flash_attn_varlen_func(
                Flash4(), q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=softmax_scale, causal=causal,
                window_size=window_size, softcap=softcap,
            )  # fmt: skip

        flash_attn_with_kvcache = Flash3.flash_attn_with_kvcache

    library = emulated(kind, OldTorch() if kind is TorchVarlen else OldFlash())
    backend = FlashBackend(HOPPER, [library], paged_kernel())
    scoring = Scoring(0.25, sinks=torch.tensor([0.5, -2.0, 3.0, 0.0]))
    for lengths in (MIXED, FRESH):
        step = make_step(lengths, heads=4, kv_heads=2, block_size=256)
        torch.testing.assert_close(run(step, scoring, backend), dense(step, scoring).float(), atol=TOLERANCE, rtol=0)


def test_libraries_are_found_or_said_to_be_absent() -> None:
    def find(name: str) -> ModuleType:
        if name == "flash_attn":
            return Flash2()  # type: ignore[return-value]
        if name == "flash_attn_interface":
            raise OSError("undefined symbol")
        if name == "torch.nn.attention.varlen":
            return ModuleType(name)  # an older PyTorch's
        raise ModuleNotFoundError(name)

    found, absent = find_libraries(find)
    assert [library.name for library in found] == ["flash2"]
    assert absent == [
        "flash4: not installed",
        "flash3: cannot be imported (OSError)",
        "torch: torch.nn.attention.varlen has no AuxRequest",
    ]


def test_this_pytorchs_own_is_called_as_it_wants_to_be() -> None:
    """Without a GPU it cannot run, but it can be traced: names and types of all arguments are checked."""
    module = importlib.import_module("torch.nn.attention.varlen")
    library = TorchVarlen(module)
    with torch.device("meta"):
        query, cache = torch.empty(7, 4, 64), torch.empty(9, 256, 2, 64)
        ints = torch.empty(4, dtype=torch.int32)
        tables = torch.empty(3, 2, dtype=torch.int32)
        keys = torch.empty(20, 2, 64)
        found = [library.attend(query, keys, keys, Spans(ints, ints, ints[:3], 3, 9), Scoring(0.1, sliding_window=4))]
        if library.lacks_pages(need(block_size=256)) is None:  # an older PyTorch's reads none
            found.append(library.attend(query, cache, cache, Spans(ints, ints, ints[:3], 3, 9, tables), Scoring(0.1)))
    for output, log_sums in found:
        assert output.shape == query.shape and log_sums.shape == (4, 7)


# ---- the trial -----------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def float32_need(**changes: Any) -> Need:
    return need(**{"dtype": torch.float32, "cache_dtype": torch.float32, "head_dim": 32, "value_dim": 32, **changes})


@pytest.mark.parametrize("name", EMULATED)
def test_libraries_that_compute_rightly_pass_their_trial(name: str) -> None:
    library = EMULATED[name]()
    for feature in (None, "sinks", *library.features):
        for block_size in (16, 256):
            needed = float32_need(block_size=block_size, features={} if feature is None else {feature: True})
            assert try_library(library, needed, CPU) is None, feature


def test_a_library_that_fails_its_trial_is_passed_over() -> None:
    class Broken(Flash4):
        def flash_attn_varlen_func(self, *_: Any, return_lse: bool = False, **__: Any) -> Any:
            raise RuntimeError("no kernel image is available")

    class Wrong(Flash2):
        def flash_attn_varlen_func(self, *arguments: Any, **keywords: Any) -> Any:
            output, *rest = super().flash_attn_varlen_func(*arguments, **keywords)
            return output + 1, *rest

    libraries = [emulated(FlashAttention4, Broken()), emulated(FlashAttention2, Wrong()), EMULATED["torch"]()]
    asked: list[str] = []

    def trial(library: VarlenLibrary, needed: Need, device: torch.device) -> str | None:
        asked.append(library.name)
        return try_library(library, needed, device)

    backend = FlashBackend(HOPPER, libraries, paged_kernel(), trial=trial)
    step, scoring = make_step(MIXED, heads=4, kv_heads=2, block_size=256), Scoring(0.25)
    for _ in range(2):
        torch.testing.assert_close(run(step, scoring, backend), dense(step, scoring).float(), atol=TOLERANCE, rtol=0)
    assert asked == ["flash4", "flash2", "torch"], "once per kind of layer"
    (choice,) = backend.choices
    assert choice.prefill is libraries[2] and choice.decode is libraries[2]
    assert "flash4: failed its trial (RuntimeError: no kernel image is available)" in str(choice)
    assert "flash2: its results on a trial differ by" in str(choice)
