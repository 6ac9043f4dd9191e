"""Tries a model when it is loaded: what its attention layers ask for, and whether its results are its own.

The engine runs tokens of many sequences, in chunks, behind one another in one row. A model is served rightly only if
nothing but attention looks at neighbouring tokens, and if attention asks for nothing beyond what reaches us. Neither
can be told from a configuration. So a few tokens of two sequences run both ways: by transformers, one sequence a row
with its own attention, and by us, in two steps of chunks, and the logits must agree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from textgen_engine.attention.base import AttentionBackend, AttentionFeatures, AttentionMetadata, Scoring
from textgen_engine.attention.bridge import STEP_ATTRIBUTE, KeywordsNotPassed
from textgen_engine.errors import ModelLoadError
from textgen_engine.kv_cache import KVCache, LayerShape
from textgen_engine.models.families.step import carry_step

# What transformers' code raises when it is called in a way it was not made for.
CALL_ERRORS = (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError)
_LENGTH = 9  # tokens of each of the two sequences
_CHUNK = (5, 4)  # of them in the first step, for each sequence
_BLOCK_SIZE = 4
# Largest difference of logits, as a share of their size, that another order of float32 additions explains; with 16-bit
# weights or quantized activations much more is explained, and a wrong mask still shows far more.
_TOLERANCE = 2e-3
_TOLERANCE_16_BIT = 0.15
_MIXERS = re.compile(
    r"mamba|ssm|conv(?![23]d)|delta|linear_?attention|rwkv|recurrent|lstm|lightning|kda|rglru|shift|indexer", re.I
)


@dataclass
class LayerNeeds:
    """What the attention layers store and ask for, by layer index."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    scorings: dict[int, Scoring] = field(default_factory=dict)

    @property
    def features(self) -> AttentionFeatures:
        """Of all layers together."""
        each = [scoring.features for scoring in self.scorings.values()]
        names = AttentionFeatures.__dataclass_fields__
        return AttentionFeatures(**{name: any(getattr(one, name) for one in each) for name in names})

    @property
    def window(self) -> int | None:
        """The widest sliding window, if every layer has one."""
        windows = [scoring.sliding_window for scoring in self.scorings.values()]
        known = [window for window in windows if window is not None]
        return max(known) if known and len(known) == len(windows) else None


def probe_layers(model: torch.nn.Module, device: torch.device, keywords: dict[str, Any]) -> LayerNeeds:
    """Run two tokens through the model to see what its attention layers store and ask for.

    A model that does not hand keywords on to its attention is changed so that they get there. Raises ModelLoadError
    for one whose attention does not reach us all the same, or asks for what attention/bridge.py refuses.
    """
    probe = _Probe()
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    metadata = AttentionMetadata(0, [2], [2], empty, empty, empty, [], [])
    name = type(model).__name__
    try:
        with torch.inference_mode():
            model(
                input_ids=ids,
                position_ids=torch.arange(2, device=device)[None],
                use_cache=False,
                attention_metadata=metadata,
                attention_backend=probe,
                **keywords,
            )
    except (KeywordsNotPassed, TypeError) as error:
        if hasattr(model, STEP_ATTRIBUTE):
            raise ModelLoadError(f"{name} cannot be served: {_one_line(error)}{mixers_of(model)}") from error
        carry_step(model)
        return probe_layers(model, device, keywords)
    except CALL_ERRORS as error:
        raise ModelLoadError(f"{name} cannot be served: {_one_line(error)}{mixers_of(model)}") from error
    needs = probe.needs
    if not needs.shapes:
        raise ModelLoadError(
            f"{name} cannot be served: its layers do not use transformers' attention interface{mixers_of(model)}"
        )
    if sorted(needs.shapes) != list(range(len(needs.shapes))):
        raise ModelLoadError(
            f"{name} cannot be served: only layers {sorted(needs.shapes)} are of plain attention{mixers_of(model)}"
        )
    return needs


def stock_logits(model: Any, vocab_size: int, device: torch.device, attention: str = "eager") -> torch.Tensor | None:
    """Logits [2, _LENGTH, vocab] of the two trial sequences by one of transformers' own attentions; None where the
    model cannot run like that. Leaves the model's attention as it was."""
    ours = model.config._attn_implementation
    try:
        model.set_attn_implementation(attention)
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=_trial_ids(vocab_size, device), use_cache=False).logits.float()
        return logits
    except CALL_ERRORS:
        return None
    finally:
        model.set_attn_implementation(ours)


def check_results(
    model: torch.nn.Module,
    backend: AttentionBackend,
    layers: list[LayerShape],
    expected: torch.Tensor,
    dtype: torch.dtype,
    *,
    rounds_activations: bool = False,
) -> None:
    """Raise ModelLoadError unless the logits through our attention, in two steps of chunks, are the expected ones.

    rounds_activations: to integers, on their way into linear layers, so that a last bit may make a step's difference.
    """
    device = expected.device
    ids = _trial_ids(expected.shape[2], device)
    num_blocks = 2 * -(-_LENGTH // _BLOCK_SIZE)
    cache = KVCache(layers, num_blocks=num_blocks, block_size=_BLOCK_SIZE, dtype=dtype, device=device)
    found = torch.empty_like(expected)
    for spans in (((0, _CHUNK[0]), (0, _CHUNK[1])), ((_CHUNK[0], _LENGTH), (_CHUNK[1], _LENGTH))):
        positions = torch.cat([torch.arange(start, end, device=device) for start, end in spans])
        metadata = _metadata(spans, positions, cache)
        backend.prepare(metadata)
        try:
            with torch.inference_mode():
                logits = model(
                    input_ids=torch.cat([ids[row, start:end] for row, (start, end) in enumerate(spans)])[None],
                    position_ids=positions[None],
                    use_cache=False,
                    attention_metadata=metadata,
                    attention_backend=backend,
                ).logits[0]
        except CALL_ERRORS as error:
            raise ModelLoadError(f"{type(model).__name__} cannot be served: {_one_line(error)}") from error
        (start, end), (other_start, other_end) = spans
        found[0, start:end] = logits[: end - start]
        found[1, other_start:other_end] = logits[end - start :]
    size = (expected - expected.mean(-1, keepdim=True)).abs().amax(-1)  # [2, _LENGTH]
    share = (found - expected).abs().amax(-1) / size.clamp(min=1e-6)
    is_exact = dtype is torch.float32 and not rounds_activations
    # In 16 bits one expert chosen otherwise changes a token's logits: most tokens must agree.
    worst = float(share.max() if is_exact else share.median())
    if not worst <= (_TOLERANCE if is_exact else _TOLERANCE_16_BIT):
        raise ModelLoadError(
            f"{type(model).__name__} cannot be served: in batches and chunks its logits differ from its own by "
            f"{worst:.2g} of their size{mixers_of(model)}"
        )


def gives_wanted_rows(
    model: torch.nn.Module,
    backend: AttentionBackend,
    layers: list[LayerShape],
    expected: torch.Tensor,
    dtype: torch.dtype,
) -> bool:
    """Whether a step of which only some rows are wanted gives those and no others, and the same for them as otherwise.

    For a model whose last layer leaves out the rest where AttentionMetadata.wanted_rows names rows."""
    device = expected.device
    ids = _trial_ids(expected.shape[2], device)
    cache = KVCache(layers, num_blocks=6, block_size=_BLOCK_SIZE, dtype=dtype, device=device)
    wanted = [1, _LENGTH - 1, 2 * _LENGTH - 1]
    found = []
    for rows in (None, wanted):
        metadata = _metadata(((0, _LENGTH), (0, _LENGTH)), torch.arange(_LENGTH, device=device).repeat(2), cache)
        metadata.wanted_rows = rows
        backend.prepare(metadata)
        try:
            with torch.inference_mode():
                logits = model(
                    input_ids=ids.view(1, -1),
                    position_ids=torch.arange(_LENGTH, device=device).repeat(2)[None],
                    use_cache=False,
                    attention_metadata=metadata,
                    attention_backend=backend,
                    logits_to_keep=0,
                ).logits[0]
        except CALL_ERRORS:
            return False
        found.append(logits.float())
    whole, some = found
    if len(some) != len(wanted):
        return False
    size = (whole - whole.mean(-1, keepdim=True)).abs().max()
    tolerance = _TOLERANCE if dtype is torch.float32 else _TOLERANCE_16_BIT
    return float((whole[wanted] - some).abs().max()) <= tolerance * float(size)


def mixers_of(model: torch.nn.Module) -> str:
    """In words, the layers that carry state from token to token outside attention; empty when none is known."""
    classes = {type(module).__name__ for module in model.modules()} - {"Conv1D"}  # that is GPT-2's linear layer
    names = sorted(
        n for n in classes if _MIXERS.search(n) and not n.endswith(("Model", "ForCausalLM", "Layer", "Block"))
    )
    return f" (it has {', '.join(names[:4])}, which carry state outside the KV cache)" if names else ""


def _trial_ids(vocab_size: int, device: torch.device) -> torch.Tensor:
    """[2, _LENGTH], all different where the vocabulary is large enough, none of them among the first ids, which are
    often padding."""
    return (torch.arange(2 * _LENGTH, device=device) * 7 + 3).remainder(vocab_size).view(2, _LENGTH)


def _metadata(spans: tuple[tuple[int, int], ...], positions: torch.Tensor, cache: KVCache) -> AttentionMetadata:
    """Two chunks; the first sequence owns the first half of the blocks, the second the other half."""
    per_sequence = cache.num_blocks // 2
    tables = torch.arange(cache.num_blocks, device=positions.device).view(2, per_sequence)
    lengths = [end - start for start, end in spans]
    blocks = [tables[row, part // cache.block_size] for row, part in enumerate(positions.split(lengths))]
    return AttentionMetadata(
        num_decodes=0,
        query_lens=lengths,
        seq_lens=[end for _, end in spans],
        block_tables=tables,
        slot_blocks=torch.cat(blocks),
        slot_offsets=positions % cache.block_size,
        keys=cache.keys,
        values=cache.values,
    )


class _Probe(AttentionBackend):
    """Notes what a trial forward stores and asks for, layer by layer."""

    def __init__(self) -> None:
        self.needs = LayerNeeds()

    def check(self, features: AttentionFeatures) -> None:
        pass

    def prepare(self, metadata: AttentionMetadata) -> None:
        pass

    def run(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        scoring: Scoring,
    ) -> torch.Tensor:
        if layer in self.needs.shapes:
            raise NotImplementedError(f"attention layer {layer} runs twice for one token")
        if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1] or key.shape[2] != query.shape[2]:
            raise NotImplementedError(f"attention layer {layer} has queries {tuple(query.shape)} on {tuple(key.shape)}")
        self.needs.shapes[layer] = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        self.needs.scorings[layer] = scoring
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
