"""Attention on a GPU: a flash library for chunks of prompts, and for decodes a library or our paged kernel.

What serves a layer is chosen from what the layer asks for and what the device and its libraries can do (choice.py),
once per kind of layer. Where nothing fits, PyTorch's operations do (sdpa.py).

Decodes come first in a step, so that they and the chunks are each one contiguous part of its rows. A chunk whose
prefix is in the cache takes its keys from there: in their place where the library reads blocks of this size, else
gathered behind one another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from textgen_engine.attention.base import AttentionBackend, AttentionFeatures, AttentionMetadata, Scoring
from textgen_engine.attention.choice import Choice, choose
from textgen_engine.attention.libraries import Need, Spans, VarlenLibrary, find_libraries
from textgen_engine.attention.library_trial import Trial, try_library
from textgen_engine.attention.paging import as_stored, is_narrow, store
from textgen_engine.attention.sdpa import Chunk, SdpaBackend, attend_chunks, plan_chunks
from textgen_engine.errors import ModelLoadError
from textgen_engine.transfer import to_device

logger = logging.getLogger(__name__)

# kernels/paged_decode.py's paged_decode and choose_num_runs, or what stands in for them in a test.
DecodeKernel = Callable[..., torch.Tensor]
ChooseRuns = Callable[[int, int, int, int], int]


@dataclass(frozen=True)
class GpuTraits:
    """Of the device: CUDA's compute capability, and its multiprocessors."""

    capability: tuple[int, int]
    num_processors: int


@dataclass(frozen=True)
class PagedKernel:
    """Our kernel for decodes, with what says into how many runs a sequence is cut."""

    decode: DecodeKernel
    choose_num_runs: ChooseRuns


@dataclass
class _Plan:
    """decodes, chunks: the two parts of the step in varlen form, None where empty; both with block tables.

    gathered: int64 block and offset of each key of the chunks' sequences; None where no chunk has a prefix.
    plain: the step once more, prepared for sdpa.py; plain_chunks: its chunks. Made when first needed.
    """

    decodes: Spans | None
    chunks: Spans | None
    gathered: tuple[torch.Tensor, torch.Tensor] | None
    plain: AttentionMetadata | None = None
    plain_chunks: list[Chunk] | None = None


class FlashBackend(AttentionBackend):
    """See the module's docstring."""

    def __init__(
        self,
        traits: GpuTraits,
        libraries: list[VarlenLibrary],
        kernel: PagedKernel | None,
        *,
        forced: str = "auto",
        absent: tuple[str, ...] = (),
        trial: Trial | None = None,
    ) -> None:
        """forced, absent: see choice.choose. trial: what a library has to pass before it serves a kind of layer."""
        self._traits = traits
        self._libraries = libraries
        self._kernel = kernel
        self._forced = forced
        self._absent = absent
        self._trial = trial
        self._plain = SdpaBackend()
        self._choices: dict[Need, Choice] = {}

    def check(self, features: AttentionFeatures) -> None:
        pass  # what no library can, PyTorch's operations can

    def choice_for(self, layer: int, dtype: torch.dtype, metadata: AttentionMetadata, scoring: Scoring) -> Choice:
        """What serves a layer; logged the first time its kind is seen."""
        keys, values = metadata.keys[layer], metadata.values[layer]
        need = Need(
            self._traits.capability,
            dtype,
            keys.dtype,
            keys.shape[3],
            values.shape[3],
            keys.shape[2],
            scoring.features,
        )
        choice = self._choices.get(need)
        if choice is None:
            choice = self._choices[need] = self._choose(need, keys.device)
            logger.info("%s", choice)
        return choice

    def _choose(self, need: Need, device: torch.device) -> Choice:
        """The first choice all of whose libraries pass their trial."""
        libraries, absent = list(self._libraries), list(self._absent)
        has_kernel, passed = self._kernel is not None, set[str]()
        while True:
            choice = choose(need, libraries, has_kernel=has_kernel, forced=self._forced, absent=tuple(absent))
            untried = [one for one in (choice.prefill, choice.decode) if one is not None and one.name not in passed]
            if self._trial is None or not untried:
                return choice
            lack = self._trial(untried[0], need, device)
            if lack is None:
                passed.add(untried[0].name)
            else:
                libraries.remove(untried[0])
                absent.append(f"{untried[0].name}: {lack}")

    @property
    def choices(self) -> list[Choice]:
        """What serves each kind of layer seen so far."""
        return list(self._choices.values())

    @property
    def fits_graphs(self) -> bool:
        """Whether decodes of all layers seen so far can be captured."""
        return all(choice.fits_graphs for choice in self._choices.values())

    def prepare(self, metadata: AttentionMetadata) -> None:
        device, num_decodes = metadata.block_tables.device, metadata.num_decodes
        query_lens, seq_lens = metadata.query_lens, metadata.seq_lens
        lengths = metadata.device_seq_lens
        if lengths is None:
            lengths = to_device(seq_lens, device, torch.int32)
        tables = metadata.block_tables.to(torch.int32)
        decodes = chunks = gathered = None
        if num_decodes:
            rows = torch.arange(num_decodes + 1, dtype=torch.int32, device=device)
            # No library looks at cu_seqlens_k where there are block tables, but flash-attn 2, which takes lengths from
            # it; a running sum on the device is right also where the lengths are a graph's buffer.
            decodes = Spans(
                rows, _running_sum(lengths[:num_decodes]), lengths[:num_decodes], 1, max(seq_lens[:num_decodes]),
                tables[:num_decodes],
            )  # fmt: skip
        if len(seq_lens) > num_decodes:
            chunk_lengths = lengths[num_decodes:]
            query_lengths = to_device(query_lens[num_decodes:], device, torch.int32)
            chunks = Spans(
                _running_sum(query_lengths),
                _running_sum(chunk_lengths),
                chunk_lengths,
                max(query_lens[num_decodes:]),
                max(seq_lens[num_decodes:]),
                tables[num_decodes:],
            )
            if query_lens[num_decodes:] != seq_lens[num_decodes:]:
                gathered = _places_of(seq_lens[num_decodes:], metadata.block_tables[num_decodes:], metadata)
        metadata.plan = _Plan(decodes, chunks, gathered)

    def run(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        scoring: Scoring,
    ) -> torch.Tensor:
        store(key, value, metadata.keys[layer], metadata.values[layer], metadata)
        return self.attend(layer, query, key, value, metadata, scoring)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        scoring: Scoring,
    ) -> torch.Tensor:
        """As `run`, of keys and values that are in the cache already."""
        plan = metadata.plan
        assert isinstance(plan, _Plan)
        choice = self.choice_for(layer, query.dtype, metadata, scoring)
        num_decodes = metadata.num_decodes
        if plan.decodes is not None and not choice.fits_graphs:
            if plan.plain is None:
                plan.plain = replace(metadata, plan=None)
                self._plain.prepare(plan.plain)
            return self._plain.run(layer, query, key, value, plan.plain, scoring)
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        if plan.decodes is not None:
            self._decode(layer, query[:num_decodes], output[:num_decodes], metadata, plan.decodes, choice, scoring)
        if plan.chunks is None:
            return output
        keys, values = metadata.keys[layer], metadata.values[layer]
        key, value = as_stored(key, keys), as_stored(value, values)
        if choice.prefill is None:
            if plan.plain_chunks is None:
                plan.plain_chunks = plan_chunks(metadata)
            attend_chunks(output, query, key, value, keys, values, plan.plain_chunks, scoring)
            return output
        spans = plan.chunks
        if plan.gathered is None:
            key, value, spans = key[num_decodes:], value[num_decodes:], replace(spans, block_tables=None)
        elif choice.prefill_pages:
            key, value = keys.transpose(1, 2), values.transpose(1, 2)
        else:
            key, value = (_gathered(cache, plan.gathered, query.dtype) for cache in (keys, values))
            spans = replace(spans, block_tables=None)
        output[num_decodes:] = _attend(choice.prefill, query[num_decodes:], key, value, spans, scoring)
        return output

    def _decode(
        self,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        metadata: AttentionMetadata,
        spans: Spans,
        choice: Choice,
        scoring: Scoring,
    ) -> None:
        keys, values = metadata.keys[layer], metadata.values[layer]
        if choice.decode is not None:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            output.copy_(_attend(choice.decode, query, keys, values, spans, scoring))
            return
        assert self._kernel is not None
        longest = spans.max_seq_len
        if scoring.sliding_window is not None:
            longest = min(longest, scoring.sliding_window)
        num_runs = self._kernel.choose_num_runs(len(query), keys.shape[1], longest, self._traits.num_processors)
        self._kernel.decode(
            query, keys, values, spans.block_tables, spans.seq_lens, scoring, num_runs=num_runs, output=output
        )


def _attend(
    library: VarlenLibrary,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spans: Spans,
    scoring: Scoring,
) -> torch.Tensor:
    """With sinks, which no weight of a key is lost to but through the sum: what they take of it is known afterwards."""
    output, log_sums = library.attend(query, keys, values, spans, scoring)
    if scoring.sinks is None:
        return output
    share = torch.sigmoid(log_sums - scoring.sinks.float()[:, None])  # [num_heads, num_rows]
    return (output * share.t()[..., None]).to(query.dtype)


def _running_sum(lengths: torch.Tensor) -> torch.Tensor:
    """int32 [n] -> [n + 1], from 0."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _places_of(
    seq_lens: list[int], block_tables: torch.Tensor, metadata: AttentionMetadata
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and offset of every token of these sequences, one sequence behind the other."""
    block_size, device = metadata.keys[0].shape[2], block_tables.device
    lengths = torch.tensor(seq_lens)
    rows = torch.repeat_interleave(torch.arange(len(seq_lens)), lengths)
    positions = torch.arange(len(rows)) - (lengths.cumsum(0) - lengths)[rows]
    rows, positions = to_device(rows, device), to_device(positions, device)
    return block_tables[rows, positions // block_size], positions % block_size


def _gathered(cache: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[num_keys, kv_heads, dim] of type `dtype`."""
    stored = cache.view(torch.uint8) if is_narrow(cache) else cache
    return stored.transpose(1, 2)[places].view(cache.dtype).to(dtype)


def make_backend(device: torch.device, forced: str = "auto") -> FlashBackend:
    """For this GPU, with the libraries that are installed. Raises ModelLoadError when the forced one is not."""
    properties = torch.cuda.get_device_properties(device)
    libraries, absent = find_libraries()
    kernel = None
    try:
        from textgen_engine.kernels.paged_decode import choose_num_runs, paged_decode

        kernel = PagedKernel(paged_decode, choose_num_runs)
    except ImportError:
        absent.append("paged: Triton's language is not installed")
    names = {library.name for library in libraries} | ({"paged"} if kernel else set()) | {"auto", "sdpa"}
    if forced not in names:
        reasons = "; ".join(reason for reason in absent if reason.startswith(forced))
        raise ModelLoadError(f"TEXTGEN_ATTENTION={forced} is not to be had: {reasons}")
    traits = GpuTraits((properties.major, properties.minor), properties.multi_processor_count)
    return FlashBackend(traits, libraries, kernel, forced=forced, absent=tuple(absent), trial=try_library)
