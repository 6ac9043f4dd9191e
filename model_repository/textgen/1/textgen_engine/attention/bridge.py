"""The one place where our attention meets transformers: a stateless function registered under ATTENTION_NAME.

A model built with `attn_implementation=ATTENTION_NAME` calls `paged_attention` in every attention layer. The step's
metadata and the backend reach it as keywords of the model's forward, never through a global. transformers is told to
build no mask tensors: causality and paging are the backend's. What else a mask would have said, a window or chunks, is
read from the function it would have been made with, and reaches `paged_attention` in the mask's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from textgen_engine.attention.base import AttentionBackend, AttentionMetadata, Scoring

ATTENTION_NAME = "textgen_paged"
# Where a module finds the step's metadata and backend if its model does not hand keywords on (models/families/step.py).
STEP_ATTRIBUTE = "textgen_step"

# Keywords that may be ignored since they change nothing here: dropout is checked to be 0, positions and cache layout
# are ours, the rest are flags of transformers' own output recording.
_IGNORED = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
        "position_embeddings", "output_router_logits", "num_items_in_batch", "return_dict", "past_key_values",
        "logits_to_keep",
    }
)  # fmt: skip


@dataclass(frozen=True)
class MaskRule:
    """What a mask of transformers says beyond causality. unknown: the function of it that is none of the known ones;
    such a mask may be built, for a layer that is not run, but not used."""

    sliding_window: int | None = None
    chunk_size: int | None = None
    unknown: str | None = None


class KeywordsNotPassed(NotImplementedError):
    """The model does not hand the keywords of its forward on to its attention."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskRule | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    is_causal: bool | None = None,
    attention_metadata: AttentionMetadata | None = None,
    attention_backend: AttentionBackend | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over our cache.

    query [1, num_heads, num_tokens, head_dim], key and value [1, num_kv_heads, num_tokens, dim] ->
    [1, num_tokens, num_heads, value_dim]. softcap and s_aux (attention sinks) are transformers' names; alibi_slopes is
    ours, from models/families. Raises NotImplementedError for a keyword or mask it does not honour; the loader's trial
    forward turns that into a refusal to load.
    """
    unknown = [name for name, given in keywords.items() if given is not None and name not in _IGNORED]
    if unknown:
        raise NotImplementedError(f"attention keywords {unknown} of {type(module).__name__}")
    rule = MaskRule() if attention_mask is None else attention_mask
    if not isinstance(rule, MaskRule) or dropout:
        raise NotImplementedError(f"attention mask or dropout of {type(module).__name__}")
    if is_causal is False:
        raise NotImplementedError(f"attention to later tokens in {type(module).__name__}")
    if rule.unknown is not None:
        raise NotImplementedError(f"attention mask {rule.unknown} in {type(module).__name__}")
    step = getattr(module, STEP_ATTRIBUTE, None)
    if step is not None:
        attention_metadata, attention_backend = step.metadata, step.backend
    if attention_metadata is None or attention_backend is None:
        raise KeywordsNotPassed(f"{type(module).__name__} does not get the keywords of its model's forward")
    if sliding_window is None:
        sliding_window = rule.sliding_window
    elif rule.sliding_window not in (None, sliding_window):
        raise NotImplementedError(f"sliding windows {sliding_window} and {rule.sliding_window} in one layer")
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError(f"{key.shape[2]} keys for {query.shape[2]} tokens in {type(module).__name__}")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise NotImplementedError(f"{type(module).__name__} has no layer index")
    output = attention_backend.run(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        attention_metadata,
        Scoring(
            scaling if scaling is not None else query.shape[-1] ** -0.5,
            sliding_window=sliding_window,
            chunk_size=rule.chunk_size,
            soft_cap=softcap,
            sinks=s_aux,
            alibi_slopes=alibi_slopes,
        ),
    )
    return output[None], None


def mask_rule(*_: Any, mask_function: Callable[..., Any] | None = None, **__: Any) -> MaskRule | None:
    """transformers' mask interface: the rule of a causal mask, None when it is causal and nothing else."""
    window = chunk_size = None
    for name, cells in _parts(mask_function):
        if name == "sliding_window_overlay":
            window = cells["sliding_window"]
        elif name == "chunked_overlay":
            chunk_size = cells["chunk_size"]
        elif name not in _PLAIN_PARTS:
            return MaskRule(unknown=name)
    return None if window is None and chunk_size is None else MaskRule(window, chunk_size)


# Causality is the backend's; packed sequences are what transformers takes a step of several sequences for.
_PLAIN_PARTS = frozenset({"causal_mask_function", "packed_sequence_mask_function"})


def _parts(function: Callable[..., Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The functions that all have to agree, each by the name of what made it and with what it was made from."""
    if function is None:
        return
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    made_from = {} if code is None else dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    name = getattr(function, "__qualname__", repr(function)).partition(".")[0]
    if name == "and_masks":
        for part in made_from["mask_functions"]:
            yield from _parts(part)
    elif name == "remap_positions_for_packed_sequence":
        yield from _parts(made_from["mask_function"])
    else:
        yield name, made_from


def register() -> None:
    """Make ATTENTION_NAME known to transformers. Idempotent; stock models are not affected."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, mask_rule)
