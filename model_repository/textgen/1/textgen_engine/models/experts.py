"""Experts as grouped products for few rows on the CPU: rows are sorted by expert, and each expert met reads its weights
once, by the compiled kernel.

transformers groups rows as well (its grouped_mm); PyTorch's product of two or three rows by a large matrix is what is
slow about that. It stays in charge of many rows, and of experts of any other form.
"""

from __future__ import annotations

from typing import Any

import torch

from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.models.cpu_linear import MOST_COMPILED_ROWS, has_hooks

_TOLERANCE = 1e-4
_TRIAL_ROWS = 5


class GroupedExperts(torch.nn.Module):
    """Stands in for a module of transformers that holds all experts of a layer in two tensors, and keeps it."""

    def __init__(self, stock: Any, kernels: CpuKernels) -> None:
        super().__init__()
        self.stock = stock
        self._kernels = kernels

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [num_tokens, hidden], the experts of each token and their weights [num_tokens, k] -> as the
        first."""
        num_tokens, num_chosen = top_k_index.shape
        if num_tokens > MOST_COMPILED_ROWS:
            many: torch.Tensor = self.stock(hidden_states, top_k_index, top_k_weights)
            return many
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        rows = hidden_states[order // num_chosen]  # [num_tokens * k, hidden], by expert
        counts = torch.bincount(chosen, minlength=self.stock.num_experts).tolist()
        parts = [self._expert(expert, part) for expert, part in enumerate(rows.split(counts)) if len(part)]
        scaled = torch.cat(parts) * top_k_weights.reshape(-1)[order, None]
        # Back in the tokens' order, so that each token adds up its experts in the order it chose them in.
        back = torch.empty_like(scaled)
        back[order] = scaled
        return back.view(num_tokens, num_chosen, -1).sum(1)

    def _expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        stock = self.stock
        biases = (stock.gate_up_proj_bias[expert], stock.down_proj_bias[expert]) if stock.has_bias else (None, None)
        both = self._kernels.linear(rows, stock.gate_up_proj[expert], biases[0])
        return self._kernels.linear(stock._apply_gate(both), stock.down_proj[expert], biases[1])


def replace_experts(model: torch.nn.Module, kernels: CpuKernels | None) -> int:
    """Put a GroupedExperts in the place of all experts of a known form that then compute the same; returns how many."""
    num_replaced = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if kernels is not None and _is_known(child) and not isinstance(module, GroupedExperts):
                grouped = GroupedExperts(child, kernels)
                if _agree(child, grouped):
                    setattr(module, name, grouped)
                    num_replaced += 1
    return num_replaced


def _is_known(module: Any) -> bool:
    """transformers' experts whose weights are [experts, outputs, inputs], gates and ups in one tensor."""
    tensors = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return (
        all(isinstance(tensor, torch.Tensor) and tensor.dim() == 3 for tensor in tensors)
        and all(tensor.is_contiguous() and tensor.dtype is torch.float32 for tensor in tensors if tensor is not None)
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
