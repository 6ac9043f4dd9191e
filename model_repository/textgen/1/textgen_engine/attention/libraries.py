"""Attention libraries for GPUs behind one call, each with what it cannot do: flash-attn 2, 3 and 4, and PyTorch's own.

What they share is the varlen form: the queries of several sequences lie behind one another, and so do their keys and
values, or the keys and values lie in the paged cache. Which of them is used is decided in choice.py. A library is
imported when it is looked for, never with this file.

    sequence      |---- 0 ----|- 1 -|------ 2 ------|
    cu_seqlens_q  0           5     7               14      query rows
    cu_seqlens_k  0                 25 ...                  keys; more than query rows where a prefix is in the cache

The last query row of a sequence sees its last key ("bottom right" causality, that of all these libraries).
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from textgen_engine.attention.base import AttentionFeatures, Scoring


@dataclass(frozen=True)
class Need:
    """What one kind of layer asks of an attention on one device. capability: CUDA's (major, minor)."""

    capability: tuple[int, int]
    dtype: torch.dtype
    cache_dtype: torch.dtype
    head_dim: int
    value_dim: int
    block_size: int
    features: AttentionFeatures


@dataclass(frozen=True, eq=False)
class Spans:
    """Sequences in varlen form: int32 tensors on the device, lengths on the host.

    cu_seqlens_q, cu_seqlens_k: [n + 1]. seq_lens: [n], keys of each. block_tables: [n, max_blocks], where keys and
    values are the paged cache's [num_blocks, block_size, kv_heads, dim].
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    max_seq_len: int
    block_tables: torch.Tensor | None = None


class VarlenLibrary(ABC):
    """One library. `name` is what the option `attention` calls it."""

    name: str
    min_capability = (8, 0)
    max_head_dim = 256
    features = frozenset[str]()  # of AttentionFeatures; sinks come on top, from the log-sums that all of them return

    def lacks(self, need: Need) -> str | None:
        """Why it cannot serve such layers; None when it can."""
        if need.capability < self.min_capability:
            return f"needs compute capability {self.min_capability[0]}.{self.min_capability[1]}"
        if need.dtype not in (torch.float16, torch.bfloat16):
            return f"no {str(need.dtype).removeprefix('torch.')}"
        if need.head_dim > self.max_head_dim or need.head_dim % 8:
            return f"no heads of {need.head_dim}"
        if need.value_dim != need.head_dim:
            return f"no values of {need.value_dim} to keys of {need.head_dim}"
        wanted = {name for name in AttentionFeatures.__dataclass_fields__ if getattr(need.features, name)}
        missing = sorted(wanted - self.features - {"sinks"})
        return f"no {', '.join(missing)}" if missing else None

    def lacks_pages(self, need: Need) -> str | None:
        """Why it cannot read the paged cache in its place; None when it can."""
        if need.cache_dtype is not need.dtype:
            return "no 8-bit cache"
        if need.block_size % self.page_multiple:
            return f"blocks of {need.block_size} tokens, not of a multiple of {self.page_multiple}"
        return None

    page_multiple = 256

    @abstractmethod
    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Spans, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [num_rows, num_heads, dim] -> output alike, and the log-sums of its weights, float32
        [num_heads, num_rows]. Sinks are the caller's business."""


class FlashAttention2(VarlenLibrary):
    """flash_attn's flash_attn_varlen_func."""

    name = "flash2"
    features = frozenset({"sliding_window", "soft_cap", "alibi"})

    def __init__(self, module: Any) -> None:
        self._varlen: Callable[..., Any] = module.flash_attn_varlen_func

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Spans, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, log_sums, _ = self._varlen(
            query,
            keys,
            values,
            spans.cu_seqlens_q,
            spans.cu_seqlens_k,
            spans.max_query_len,
            spans.max_seq_len,
            softmax_scale=scoring.scale,
            causal=True,
            window_size=_window(scoring, -1),
            softcap=scoring.soft_cap or 0.0,
            alibi_slopes=scoring.alibi_slopes,
            return_attn_probs=True,
            block_table=spans.block_tables,
        )
        return output, log_sums


class FlashAttention3(VarlenLibrary):
    """flash_attn_interface's flash_attn_with_kvcache, which takes pages of any size, and flash_attn_varlen_func."""

    name = "flash3"
    min_capability = (9, 0)
    features = frozenset({"sliding_window", "soft_cap", "chunks"})
    page_multiple = 1

    def __init__(self, module: Any) -> None:
        self._varlen: Callable[..., Any] = module.flash_attn_varlen_func
        self._paged: Callable[..., Any] = module.flash_attn_with_kvcache
        # Without this switch the log-sums always come.
        self._has_log_sum_switch = "return_attn_probs" in inspect.signature(self._varlen).parameters

    def lacks(self, need: Need) -> str | None:
        return "made for compute capability 9.x" if need.capability >= (10, 0) else super().lacks(need)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Spans, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keywords = {
            "softmax_scale": scoring.scale,
            "causal": True,
            "window_size": _window(scoring, -1),
            "attention_chunk": scoring.chunk_size or 0,
            "softcap": scoring.soft_cap or 0.0,
        }
        if spans.block_tables is None:
            output, log_sums = self._varlen(
                query,
                keys,
                values,
                spans.cu_seqlens_q,
                spans.cu_seqlens_k,
                spans.max_query_len,
                spans.max_seq_len,
                **({"return_attn_probs": True} if self._has_log_sum_switch else {}),
                **keywords,
            )[:2]
        else:
            output, log_sums = self._paged(
                query,
                keys,
                values,
                cache_seqlens=spans.seq_lens,
                page_table=spans.block_tables,
                cu_seqlens_q=spans.cu_seqlens_q,
                max_seqlen_q=spans.max_query_len,
                return_softmax_lse=True,
                **keywords,
            )[:2]
        return output, log_sums


class FlashAttention4(VarlenLibrary):
    """flash_attn.cute's flash_attn_varlen_func, for Hopper and Blackwell."""

    name = "flash4"
    min_capability = (9, 0)
    max_head_dim = 128
    features = frozenset({"sliding_window", "soft_cap"})

    def __init__(self, module: Any) -> None:
        self._varlen: Callable[..., Any] = module.flash_attn_varlen_func
        # Without this switch the log-sums always come.
        self._has_log_sum_switch = "return_lse" in inspect.signature(self._varlen).parameters

    def lacks_pages(self, need: Need) -> str | None:
        return "its pages differ from version to version"

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Spans, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, log_sums = self._varlen(
            query,
            keys,
            values,
            cu_seqlens_q=spans.cu_seqlens_q,
            cu_seqlens_k=spans.cu_seqlens_k,
            max_seqlen_q=spans.max_query_len,
            max_seqlen_k=spans.max_seq_len,
            softmax_scale=scoring.scale,
            causal=True,
            window_size=_window(scoring, None),
            softcap=scoring.soft_cap or 0.0,
            **({"return_lse": True} if self._has_log_sum_switch else {}),
        )[:2]
        return output, log_sums


class TorchVarlen(VarlenLibrary):
    """torch.nn.attention.varlen's varlen_attn: flash-attn 2 inside. What it takes has grown from version to version."""

    name = "torch"
    features = frozenset({"sliding_window"})

    def __init__(self, module: Any) -> None:
        self._varlen: Callable[..., Any] = module.varlen_attn
        self._wants_log_sums = module.AuxRequest(lse=True)
        takes = inspect.signature(self._varlen).parameters
        self._missing = [name for name in ("return_aux", "window_size") if name not in takes]
        # Before it had this switch it took fewer key heads than query heads without a word.
        self._has_gqa_switch = "enable_gqa" in takes
        self._takes_pages = "block_table" in takes and "seqused_k" in takes

    def lacks(self, need: Need) -> str | None:
        return f"this PyTorch's takes no {self._missing[0]}" if self._missing else super().lacks(need)

    def lacks_pages(self, need: Need) -> str | None:
        return super().lacks_pages(need) if self._takes_pages else "this PyTorch's takes no block tables"

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: Spans, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        paged: dict[str, Any] = {}
        if spans.block_tables is not None:
            paged = {"seqused_k": spans.seq_lens, "block_table": spans.block_tables}
        output, log_sums = self._varlen(
            query,
            keys,
            values,
            spans.cu_seqlens_q,
            spans.cu_seqlens_k,
            spans.max_query_len,
            spans.max_seq_len,
            return_aux=self._wants_log_sums,
            scale=scoring.scale,
            window_size=_window(scoring, -1),
            **({"enable_gqa": query.shape[1] != keys.shape[-2]} if self._has_gqa_switch else {}),
            **paged,
        )
        # Documented as [num_rows, num_heads]; the kernel inside gives [num_heads, num_rows].
        return output, log_sums if len(log_sums) == query.shape[1] else log_sums.t()


# In order of preference.
LIBRARIES: tuple[tuple[str, Callable[[Any], VarlenLibrary], str], ...] = (
    ("flash_attn.cute", FlashAttention4, "flash_attn_varlen_func"),
    ("flash_attn_interface", FlashAttention3, "flash_attn_varlen_func"),
    ("flash_attn", FlashAttention2, "flash_attn_varlen_func"),
    ("torch.nn.attention.varlen", TorchVarlen, "AuxRequest"),
)


def find_libraries(
    find: Callable[[str], ModuleType] = importlib.import_module,
) -> tuple[list[VarlenLibrary], list[str]]:
    """Those that can be imported, in order of preference, and for each of the others what it lacks to be."""
    found: list[VarlenLibrary] = []
    absent: list[str] = []
    for module_name, library, function in LIBRARIES:
        name = getattr(library, "name", module_name)
        try:
            module = find(module_name)
            if not hasattr(module, function):
                absent.append(f"{name}: {module_name} has no {function}")
                continue
            found.append(library(module))
        except ModuleNotFoundError:
            absent.append(f"{name}: not installed")
        except Exception as error:  # built for another torch or CUDA: whatever its loader raises
            absent.append(f"{name}: cannot be imported ({type(error).__name__})")
    return found, absent


def _window(scoring: Scoring, unlimited: int | None) -> tuple[int | None, int]:
    """Keys before and after the query's own that are seen."""
    return (unlimited if scoring.sliding_window is None else scoring.sliding_window - 1, 0)
