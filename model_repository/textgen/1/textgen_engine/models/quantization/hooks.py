"""Chooses the method that an option or a checkpoint asks for, and applies it while weights are read.

Linear layers and experts are quantized. Embeddings, the LM head, norms and the routers of
experts (left out by their size) stay as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from textgen_engine.errors import ModelLoadError
from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.models.quantization.awq import Awq
from textgen_engine.models.quantization.bitsandbytes_4bit import TABLES, FourBit
from textgen_engine.models.quantization.bitsandbytes_stored import BitsAndBytes
from textgen_engine.models.quantization.compressed_tensors import CompressedTensors
from textgen_engine.models.quantization.eetq import WeightOnlyInt8
from textgen_engine.models.quantization.experts import (
    PROJECTIONS,
    STORED_NAMES,
    QuantizedExperts,
    StoredExperts,
    quantized_experts,
)
from textgen_engine.models.quantization.fp8 import Fp8AtLoad, Fp8Checkpoint
from textgen_engine.models.quantization.gptq import Gptq
from textgen_engine.models.quantization.int8 import Int8
from textgen_engine.models.quantization.linear import CodedLinear, QuantizedLinear, choose_gpu_kernel
from textgen_engine.models.quantization.method import LoadMethod, Method, StoredLinear, StoredMethod
from textgen_engine.models.weights import StoredTensor, WeightHooks

_STORED: dict[str, Callable[[dict[str, Any], Mapping[str, tuple[int, ...]]], Method]] = {
    "gptq": Gptq,
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "fp8": Fp8Checkpoint,
    "compressed-tensors": CompressedTensors,
}
# Older checkpoints say it in a file of its own.
_OLD_FILES = {"gptq": "quantize_config.json", "awq": "quant_config.json"}
# Fewer outputs than this are a router's or a gate's: nothing to gain, much to lose.
_LEAST_OUTPUTS = 16
# A tensor of one projection of one expert: the experts' module, the expert, the projection, the rest of the name.
_OF_AN_EXPERT = re.compile(rf"(.+)\.(\d+)\.({'|'.join(name for names in STORED_NAMES for name in names)})\.(.+)")


def checkpoint_settings(folder: Path, hf_config: Any) -> dict[str, Any] | None:
    """What the checkpoint says of its own quantization, with `quant_method`; None for plain weights."""
    settings = getattr(hf_config, "quantization_config", None)
    if settings is not None:
        return dict(settings) if isinstance(settings, Mapping) else dict(settings.to_dict())
    for method, name in _OLD_FILES.items():
        if (folder / name).is_file():
            try:
                return {"quant_method": method, **json.loads((folder / name).read_text())}
            except (OSError, ValueError, TypeError) as error:
                raise ModelLoadError(f"{folder / name} cannot be read: {error}") from error
    return None


def choose_method(
    asked: str | None, settings: dict[str, Any] | None, stored: Mapping[str, tuple[int, ...]]
) -> Method | None:
    """The method for QUANTIZE=asked on a checkpoint with these settings and names of stored tensors.

    None: nothing for us to do: plain weights, or a method that transformers itself undoes. Raises ModelLoadError where
    option and checkpoint contradict each other.
    """
    if settings is None:
        if asked is None:
            return None
        if asked in ("gptq", "awq", "compressed-tensors"):
            raise ModelLoadError(
                f"QUANTIZE={asked} needs a checkpoint whose weights are so quantized; this one has no "
                f"quantization_config"
            )
        if asked in TABLES:
            return FourBit(asked)
        return {"int8": Int8(), "fp8": Fp8AtLoad()}.get(asked) or WeightOnlyInt8(asked)
    method = str(settings.get("quant_method"))
    if asked is not None and asked not in _names_of(method, settings):
        raise ModelLoadError(
            f"QUANTIZE={asked} contradicts the checkpoint, whose weights are quantized already: {method} "
            f"(quantization_config)"
        )
    if method not in _STORED:
        if asked is not None:
            raise ModelLoadError(f"checkpoints quantized by {method} are not served; {', '.join(_STORED)} are")
        return None
    return _STORED[method](settings, stored)


def _names_of(method: str, settings: dict[str, Any]) -> set[str]:
    """As QUANTIZE may call what the checkpoint says of itself."""
    if method == "bitsandbytes" and settings.get("load_in_4bit"):
        return {method, f"{method}-{settings.get('bnb_4bit_quant_type', 'fp4')}"}
    return {method}


class QuantizationHooks(WeightHooks):
    """Applies one method to a model. num_quantized: weights of the layers that `prepare` last replaced."""

    def __init__(
        self,
        method: Method,
        kernels: CpuKernels | None,
        settings: dict[str, Any] | None = None,
        stored: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """settings: the checkpoint's own. stored: its tensors."""
        self.method = method
        self._stored = stored or {}
        self._of_experts: dict[str, tuple[str, str]] = {}  # a stored tensor -> its layer's prefix, its own name there
        self._taken: dict[str, dict[str, StoredTensor]] = {}
        self._kernels = kernels
        settings = settings or {}
        kept = settings.get("modules_to_not_convert") or settings.get("ignore") or []
        self._kept = [name.removeprefix("re:") if name.startswith("re:") else re.escape(name) for name in kept]
        self.num_quantized = 0
        self._mismatched: list[str] = []
        self._summary = ""

    def prepare(self, model: torch.nn.Module) -> None:
        """Put the method's modules in the place of linear layers. Raises ModelLoadError if there is none for it."""
        find_head: Any = getattr(model, "get_output_embeddings", None)
        head = None if find_head is None else find_head()
        named = dict(model.named_modules())
        num_layers = num_replaced = self.num_quantized = 0
        num_experts = 0
        stored_experts = self._stored_experts(model)
        for name, linear in named.items():
            experts: QuantizedExperts | StoredExperts | None = None
            if isinstance(self.method, LoadMethod) and not self._is_named(name):
                experts = quantized_experts(linear, self.method)
            elif isinstance(self.method, StoredMethod) and name in stored_experts:
                experts = StoredExperts(linear, self.method, name, stored_experts[name])
            if experts is not None:
                parent, _, attribute = name.rpartition(".")
                setattr(named[parent] if parent else model, attribute, experts)
                num_experts += 1
                self.num_quantized += experts.num_weights
                continue
            if type(linear) is not torch.nn.Linear or linear is head:
                continue
            num_layers += 1
            module = None if self._is_kept(name, linear) else self.method.replacement(linear, name)
            if module is not None:
                parent, _, attribute = name.rpartition(".")
                setattr(named[parent] if parent else model, attribute, module)
                num_replaced += 1
                self.num_quantized += linear.in_features * linear.out_features
        kind = type(model).__name__
        if not num_replaced and not num_experts:
            raise ModelLoadError(f"QUANTIZE={self.method.name}: {kind} has no linear layer that it applies to")
        rest = sum(parameter.numel() for parameter in model.parameters())
        share = self.num_quantized / (self.num_quantized + rest)
        experts_too = f" and the experts of {num_experts} layers" if num_experts else ""
        self._summary = (
            f"{num_replaced} of {num_layers} linear layers{experts_too} {self.method.name} ({share:.0%} of all "
            f"weights), LM head and embeddings as they are"
        )

    def _stored_experts(self, model: Any) -> dict[str, dict[tuple[int, str], str]]:
        """For modules whose experts the checkpoint has quantized, one by one: the prefix of each one's tensors, by
        expert and projection. Raises ModelLoadError for such that are joined in the checkpoint, too."""
        found: dict[str, dict[tuple[int, str], str]] = {}
        self._of_experts = {}
        if not isinstance(self.method, StoredMethod):
            return found
        modules = {name for name, module in model.named_modules() if hasattr(module, PROJECTIONS[0])}
        transforms = get_model_conversion_mapping(model) if modules else []
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        for stored in self._stored if modules else ():
            name, _ = rename_source_key(stored, renamings, [])
            parts = _OF_AN_EXPERT.fullmatch(name)
            if parts is not None and parts[1] in modules:
                prefix = stored.removesuffix(f".{parts[4]}")
                found.setdefault(parts[1], {})[int(parts[2]), parts[3]] = prefix
                _, _, attribute = self.method.stored_name(f"layer.{parts[4]}").rpartition(".")
                self._of_experts[stored] = prefix, attribute
            owner, mark, suffix = name.rpartition(f".{PROJECTIONS[0]}_")
            if owner in modules and mark and not suffix.startswith("bias"):
                raise ModelLoadError(f"{stored}: experts whose {self.method.name} weights are joined are not served")
        plain = {prefix for prefix, _ in self._of_experts.values()}
        plain -= {prefix for prefix, attribute in self._of_experts.values() if attribute not in ("weight", "bias")}
        self._of_experts = {name: pair for name, pair in self._of_experts.items() if pair[0] not in plain}
        quantized = {name for name, prefixes in found.items() if not plain.issuperset(prefixes.values())}
        return {name: prefixes for name, prefixes in found.items() if name in quantized}

    def _is_kept(self, name: str, linear: torch.nn.Linear) -> bool:
        if isinstance(self.method, LoadMethod) and linear.out_features < _LEAST_OUTPUTS:
            return True
        return self._is_named(name)

    def _is_named(self, name: str) -> bool:
        """Whether the checkpoint's settings say that this module is not to be quantized."""
        return any(re.fullmatch(rf"(.*\.)?{pattern}(\..*)?", name) for pattern in self._kept)

    def takes(self, tensor: StoredTensor) -> bool:
        if tensor.name not in self._of_experts:
            return False
        prefix, attribute = self._of_experts[tensor.name]
        self._taken.setdefault(prefix, {})[attribute] = tensor
        return True

    def complete(self, model: torch.nn.Module, device: torch.device) -> None:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, StoredExperts):
                    setattr(module, name, child.read(self._taken, device))
        self._taken.clear()

    def name_in_model(self, name: str) -> str:
        return self.method.stored_name(name) if isinstance(self.method, StoredMethod) else name

    def wants(self, model: torch.nn.Module, name: str) -> bool:
        if not isinstance(self.method, LoadMethod):
            return False
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, QuantizedExperts):
            return attribute in PROJECTIONS
        return attribute == "weight" and isinstance(module, QuantizedLinear)

    def convert(self, model: torch.nn.Module, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        assert isinstance(self.method, LoadMethod)
        owner, _, attribute = name.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, QuantizedExperts):
            expected = layer.shape(attribute)
        else:
            assert isinstance(layer, QuantizedLinear)
            expected = (layer.out_features, layer.in_features)
        if tuple(tensor.shape) != expected:
            self._mismatched.append(f"{name} of shape {list(tensor.shape)}, the model's is {list(expected)}")
            return {}
        if isinstance(layer, QuantizedExperts):
            return {f"{owner}.{part}": value for part, value in layer.quantize(attribute, tensor).items()}
        prefix = name.removesuffix("weight")
        return {prefix + part: value for part, value in self.method.quantize(tensor.float()).items()}

    def check_shapes(self) -> None:
        """After loading: raise ModelLoadError for weights of another shape than the model's."""
        if self._mismatched:
            more = f" and {len(self._mismatched) - 1} more" if len(self._mismatched) > 1 else ""
            raise ModelLoadError(f"the checkpoint has {self._mismatched[0]}{more}: config.json is another model's")

    def finish(self, model: torch.nn.Module, device: torch.device) -> str:
        """After loading: stored layers become the ones that run, one by one, and all get the kernels that the device
        can run; returns what was done."""
        gpu_kernel = choose_gpu_kernel(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, (StoredLinear, QuantizedExperts)):
                    setattr(module, name, child.finished())
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.kernels = self._kernels
            if isinstance(module, CodedLinear):
                module.gpu_kernel = gpu_kernel
                module.bring(device)
        if self._kernels is not None:
            how = "compiled kernels"
        elif gpu_kernel is not None:
            how = "a kernel in Triton's language"
        else:
            how = "weights are dequantized for every product"
        return f"{self._summary}, {how}"
