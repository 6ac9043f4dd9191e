"""Which part of each stored tensor a rank reads: the plan's parts, followed back through transformers' conversions.

transformers renames tensors of a checkpoint, and stacks and joins some (experts that lie one by one in the files). A
part of a parameter is therefore a part of each tensor that it is made from. What is read is that part and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from textgen_engine.models.quantization.method import StoredLinear
from textgen_engine.models.sharding import Plan
from textgen_engine.models.weights import StoredParts, StoredTensor, WeightHooks
from textgen_engine.parallel.split import CannotSplit, Slice


class PartHooks(WeightHooks):
    """Gives a model the shapes of one rank's part, and reads that part. outline: the whole model, without memory.

    inner: what then happens to the part, as it would to a whole model (quantization). Its stored tensors have parts
    once `prepare` has been called, which is done with the outline before anything is selected.
    """

    def __init__(self, plan: Plan, outline: Any, inner: WeightHooks | None = None) -> None:
        self._plan = plan
        self._inner = inner or WeightHooks()
        transforms = get_model_conversion_mapping(outline)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._prefix: str = outline.base_model_prefix
        self._outline: dict[str, torch.Tensor] = outline.state_dict()
        self._slices = dict(plan.slices)

    def prepare(self, model: torch.nn.Module) -> None:
        self._plan.shrink(model)
        self._inner.prepare(model)
        for name, module in model.named_modules():
            if isinstance(module, StoredLinear):
                for tensor_name, tensor in module.named_buffers(recurse=False):
                    full_name = f"{name}.{tensor_name}"
                    self._outline.setdefault(full_name, tensor)
                    self._slices.pop(full_name, None)
                    if tensor_name in module.slices:
                        self._slices[full_name] = module.slices[tensor_name]

    def name_in_model(self, name: str) -> str:
        return self._inner.name_in_model(name)

    def wants(self, model: torch.nn.Module, name: str) -> bool:
        return self._inner.wants(model, name)

    def convert(self, model: torch.nn.Module, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._inner.convert(model, name, tensor)

    def takes(self, tensor: StoredTensor) -> bool:
        return self._inner.takes(tensor)

    def complete(self, model: torch.nn.Module, device: torch.device) -> None:
        self._inner.complete(model, device)

    def select(self, tensor: StoredTensor) -> StoredTensor | StoredParts:
        """Raises CannotSplit for a conversion that cannot be followed back."""
        part = self._part_of(tensor.name)
        if part is None:
            return tensor
        parts = tuple(tensor.narrow(part.dim, start, stop - start) for start, stop in part.ranges)
        return parts[0] if len(parts) == 1 else StoredParts(parts, part.dim)

    def _part_of(self, name: str) -> Slice | None:
        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._outline)
        if target not in self._outline and name in self._outline:
            target, pattern = name, None
        part = self._slices.get(target)
        if part is None or pattern is None:
            return part
        converter = next(converter for converter in self._converters if pattern in converter.source_patterns)
        return _part_of_source(part, self._outline[target].shape, converter, pattern)


def _part_of_source(part: Slice, whole: torch.Size, converter: WeightConverter, pattern: str) -> Slice:
    """The part of one source tensor, for a part of what it is converted to: experts that lie one by one in the file
    are stacked, gates and ups then joined."""
    dim, ranges = part.dim, part.ranges
    for operation in reversed(converter.operations):
        if isinstance(operation, Concatenate) and operation.dim == dim:
            # As many sources as there are ranges, of the same length each.
            sources = converter.source_patterns
            if len(sources) != len(ranges) or whole[dim] % len(sources):
                break
            index = sources.index(pattern)
            length = whole[dim] // len(sources)
            start, stop = (end - index * length for end in ranges[index])
            if not 0 <= start < stop <= length:
                break
            ranges = ((start, stop),)
        elif isinstance(operation, MergeModulelist) and operation.dim == 0 and dim > 0:
            dim -= 1
        elif not isinstance(operation, Concatenate):
            break
    else:
        return Slice(dim, ranges)
    raise CannotSplit(f"its weights {converter.source_patterns} are converted in a way that cannot be split")
