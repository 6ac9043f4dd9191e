"""Experts as grouped products on the CPU: rows are sorted by expert, and each expert met reads its packed weights once,
by the compiled kernel.

transformers groups rows as well (its grouped_mm); PyTorch's product of two or three rows by a large matrix is what is
slow about that. It stays in charge of experts of any other form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.kernels.cpu_records import PackedWeight
from textgen_engine.mapped_memory import WeightMemory
from textgen_engine.models.cpu_linear import has_hooks

_TOLERANCE = 1e-4
_TRIAL_ROWS = 5


class GroupedExperts(torch.nn.Module):
    """Stands in for a module of transformers that holds all experts of a layer in two tensors, and keeps it, but for
    these tensors once `release` is called."""

    def __init__(self, stock: Any, kernels: CpuKernels, memory: WeightMemory | None = None) -> None:
        super().__init__()
        self.stock = stock
        self._kernels = kernels
        empty = None if memory is None else memory.empty
        self._sizes = stock.gate_up_proj.shape[1], stock.down_proj.shape[1]
        self._weights: dict[str, list[PackedWeight]] = {}
        for name in ("gate_up", "down"):
            biases = getattr(stock, f"{name}_proj_bias") if stock.has_bias else [None] * stock.num_experts
            weights = [kernels.pack(weight, empty) for weight in getattr(stock, f"{name}_proj").detach()]
            self._weights[name] = [PackedWeight(*pair) for pair in zip(weights, biases, strict=True)]
            for expert, weight in enumerate(weights):
                self.register_buffer(f"{name}_{expert}", weight, persistent=False)

    def release(self) -> None:
        """Let the stock module's weights go."""
        del self.stock.gate_up_proj, self.stock.down_proj

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [num_tokens, hidden], the experts of each token and their weights [num_tokens, k] -> as the
        first."""
        return by_expert(hidden_states, top_k_index, top_k_weights, self.stock.num_experts, self._expert)

    def _expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        gate_up, down = (self._weights[name][expert] for name in ("gate_up", "down"))
        both = self._kernels.linear(rows, gate_up, self._sizes[0])
        return self._kernels.linear(self.stock._apply_gate(both), down, self._sizes[1])


def by_expert(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_experts: int,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Each token's weighted sum over its experts, where expert(number, rows) computes an expert's rows all at once."""
    num_tokens, num_chosen = top_k_index.shape
    chosen, order = top_k_index.reshape(-1).sort(stable=True)
    rows = hidden_states[order // num_chosen]  # [num_tokens * k, hidden], by expert
    counts = torch.bincount(chosen, minlength=num_experts).tolist()
    parts = [expert(number, part) for number, part in enumerate(rows.split(counts)) if len(part)]
    scaled = torch.cat(parts) * top_k_weights.reshape(-1)[order, None].to(rows.dtype)
    # Back in the tokens' order, so that each token adds up its experts in the order it chose them in.
    back = torch.empty_like(scaled)
    back[order] = scaled
    return back.view(num_tokens, num_chosen, -1).sum(1)


def replace_experts(model: torch.nn.Module, kernels: CpuKernels | None) -> int:
    """Put a GroupedExperts in the place of all experts of a known form that then compute the same; returns how many."""
    num_replaced = 0
    memory = WeightMemory()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if kernels is not None and _is_known(child) and not isinstance(module, GroupedExperts):
                grouped = GroupedExperts(child, kernels, memory)
                if _agree(child, grouped):
                    grouped.release()
                    setattr(module, name, grouped)
                    num_replaced += 1
    return num_replaced


def _is_known(module: Any) -> bool:
    return has_known_form(module) and all(
        tensor.is_contiguous() and tensor.dtype is torch.float32 for tensor in (module.gate_up_proj, module.down_proj)
    )


def has_known_form(module: Any) -> bool:
    """transformers' experts whose weights are [experts, outputs, inputs], gates and ups in one tensor."""
    tensors = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return (
        all(isinstance(tensor, torch.Tensor) and tensor.dim() == 3 for tensor in tensors)
        and getattr(module, "has_gate", False)
        and not getattr(module, "is_transposed", True)
        and not getattr(module, "has_post_expert_norm", True)
        and hasattr(module, "has_bias")
        and not has_hooks(module)
    )


@torch.inference_mode()
def _agree(stock: Any, grouped: GroupedExperts) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIAL_ROWS, stock.gate_up_proj.shape[2], generator=generator)
    num_chosen = min(2, stock.num_experts)
    scores = torch.rand(_TRIAL_ROWS, stock.num_experts, generator=generator)
    weights, index = scores.topk(num_chosen)
    try:
        expected, found = stock(x, index, weights), grouped(x, index, weights)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError):
        return False
    return bool(torch.allclose(found, expected, atol=_TOLERANCE * float(expected.abs().max()), rtol=0))
