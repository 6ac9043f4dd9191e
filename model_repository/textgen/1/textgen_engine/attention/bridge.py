"""The one place where our attention meets transformers: a stateless function registered under ATTENTION_NAME.

A model built with `attn_implementation=ATTENTION_NAME` calls `paged_attention` in every attention layer. The step's
metadata and the backend reach it as keywords of the model's forward, never through a global. transformers is told to
build no mask: causality and paging are the backend's.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from textgen_engine.attention.base import AttentionBackend, AttentionMetadata

ATTENTION_NAME = "textgen_paged"

# Keywords that may be ignored since they change nothing here: dropout is checked to be 0, positions and cache layout
# are ours, the rest are flags of transformers' own output recording.
_IGNORED = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal",
        "position_embeddings", "output_router_logits", "num_items_in_batch", "return_dict", "past_key_values",
    }
)  # fmt: skip


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    attention_metadata: AttentionMetadata | None = None,
    attention_backend: AttentionBackend | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over our cache.

    query [1, num_heads, num_tokens, head_dim], key and value [1, num_kv_heads, num_tokens, dim] ->
    [1, num_tokens, num_heads, value_dim]. Raises NotImplementedError for a keyword it does not honour; the loader's
    trial forward turns that into a refusal to load.
    """
    unknown = [name for name, given in keywords.items() if given is not None and name not in _IGNORED]
    if unknown:
        raise NotImplementedError(f"attention keywords {unknown} of {type(module).__name__}")
    if attention_mask is not None or dropout:
        raise NotImplementedError(f"attention mask or dropout of {type(module).__name__}")
    if attention_metadata is None or attention_backend is None:
        raise NotImplementedError(f"{type(module).__name__} does not pass keywords on to its attention")
    layer = module.layer_idx
    assert isinstance(layer, int)
    output = attention_backend.run(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        attention_metadata,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        sliding_window=sliding_window,
    )
    return output[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def register() -> None:
    """Make ATTENTION_NAME known to transformers. Idempotent; stock models are not affected."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _no_mask)
