"""Small packers: plain checkpoints made into ones as GPTQ's, AWQ's and others' tools write them, and what those mean.

Each takes a weight [outputs, inputs] and answers with the tensors of its format, and with the weight that they stand
for, computed from the codes before they are packed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
_LINEAR = re.compile(r"(_proj|\.w[123])\.weight$")


def repack(plain: Path, folder: Path, settings: dict[str, Any], pack: Callable[[torch.Tensor], Packed]) -> Path:
    """Copies of a checkpoint: `folder`/packed with quantized linear layers, `folder`/meant with what they mean."""
    for name in ("packed", "meant"):
        shutil.copytree(plain, folder / name)
    packed, meant = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        packed[name] = meant[name] = tensor
        if _LINEAR.search(name):
            del packed[name]
            parts, meant[name] = pack(tensor)
            packed |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
    save_file(packed, folder / "packed" / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, folder / "meant" / "model.safetensors", metadata={"format": "pt"})
    path = folder / "packed" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    return folder


def _coded(weight: torch.Tensor, bits: int, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric codes of a weight whose input i belongs to groups[i]: codes, zeros and scales [outputs, groups]."""
    num_groups, largest = int(groups.max()) + 1, (1 << bits) - 1
    members = [weight[:, groups == group] for group in range(num_groups)]
    low = torch.stack([part.amin(1).clamp(max=0) for part in members], 1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in members], 1)
    scales = ((high - low) / largest).half().float()
    zeros = (-low / scales).round().clamp(1, largest)
    codes = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, largest)
    return codes.int(), zeros.int(), scales


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [rows, n] -> int32 [rows, n * bits / 32], the first in the lowest bits."""
    per_word = 32 // bits
    parts = codes.long().view(codes.shape[0], -1, per_word) << (torch.arange(per_word) * bits)
    return (parts.sum(2) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def gptq(bits: int, group_size: int, *, act_order: bool = False, version: int = 1) -> Callable[[torch.Tensor], Packed]:
    def pack(weight: torch.Tensor) -> Packed:
        inputs = weight.shape[1]
        size = inputs if group_size == -1 else group_size
        groups = torch.arange(inputs) // size
        if act_order:
            groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        codes, zeros, scales = _coded(weight, bits, groups)
        parts = {
            "qweight": _words(codes, bits).t(),
            "qzeros": _words(zeros.t() - int(version == 1), bits),
            "scales": scales.t().half(),
            "g_idx": groups.int(),
        }
        # Words hold several inputs of one output, the words of an output stand in a column.
        return parts, (codes - zeros[:, groups]) * scales[:, groups]

    return pack


def awq(group_size: int) -> Callable[[torch.Tensor], Packed]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight outputs comes next in a word

    def interleaved(codes: torch.Tensor) -> torch.Tensor:
        return codes.view(codes.shape[0], -1, 8)[:, :, order].reshape(codes.shape)

    def pack(weight: torch.Tensor) -> Packed:
        groups = torch.arange(weight.shape[1]) // group_size
        codes, zeros, scales = _coded(weight, 4, groups)
        parts = {
            "qweight": _words(interleaved(codes.t().contiguous()), 4),
            "qzeros": _words(interleaved(zeros.t().contiguous()), 4),
            "scales": scales.t().half(),
        }
        return parts, (codes - zeros[:, groups]) * scales[:, groups]

    return pack


def float8_blocks(rows: int, columns: int) -> Callable[[torch.Tensor], Packed]:
    def pack(weight: torch.Tensor) -> Packed:
        outputs, inputs = weight.shape
        scales = torch.empty(-(-outputs // rows), -(-inputs // columns))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                scales[i, j] = block.abs().max() / 448
        spread = scales.repeat_interleave(rows, 0)[:outputs].repeat_interleave(columns, 1)[:, :inputs]
        codes = (weight / spread).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scales}, codes.float() * spread

    return pack


def float8_channels(weight: torch.Tensor) -> Packed:
    scales = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scales).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales.bfloat16()}, codes.float() * scales.bfloat16().float()


def int8_channels(weight: torch.Tensor) -> Packed:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes * scales


def packed_groups(bits: int, group_size: int) -> Callable[[torch.Tensor], Packed]:
    def pack(weight: torch.Tensor) -> Packed:
        outputs, inputs = weight.shape
        middle = 1 << (bits - 1)
        parts = weight.view(outputs, -1, group_size)
        scales = parts.abs().amax(2) / (middle - 1)
        codes = (parts / scales[:, :, None]).round().clamp(-middle, middle - 1)
        words = _words((codes + middle).int().view(outputs, inputs), bits)
        shape = torch.tensor([outputs, inputs])
        meant = (codes * scales[:, :, None]).view(outputs, inputs)
        return {"weight_packed": words, "weight_scale": scales, "weight_shape": shape}, meant

    return pack


def bitsandbytes_int8(weight: torch.Tensor) -> Packed:
    largest = weight.abs().amax(1)
    codes = (weight * (127 / largest)[:, None]).round().to(torch.int8)
    parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes * (largest / 127)[:, None]


def bitsandbytes_4bit(kind: str, table: torch.Tensor, *, nested: bool = False) -> Callable[[torch.Tensor], Packed]:
    """kind: nf4 or fp4; table: what its 16 codes mean. nested: scales as 8-bit codes on a table of 256."""

    def pack(weight: torch.Tensor) -> Packed:
        blocks = weight.reshape(-1, 64)
        largest = blocks.abs().amax(1)
        codes = (blocks / largest[:, None] - table.view(-1, 1, 1)).abs().argmin(0).to(torch.uint8).view(-1, 2)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
        parts = {"weight": codes[:, :1] << 4 | codes[:, 1:], "weight.quant_map": table.clone()}
        if nested:
            offset = float(largest.mean())
            groups = torch.arange(len(largest)) // 256
            spread = torch.zeros(int(groups[-1]) + 1).scatter_reduce(0, groups, (largest - offset).abs(), "amax")
            steps = torch.linspace(-1, 1, 256)
            nearest = ((largest - offset) / spread[groups] - steps[:, None]).abs().argmin(0)
            largest = steps[nearest] * spread[groups] + offset
            parts |= {"weight.absmax": nearest.to(torch.uint8), "weight.nested_absmax": spread}
            parts["weight.nested_quant_map"] = steps
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        else:
            parts["weight.absmax"] = largest
        name = f"weight.quant_state.bitsandbytes__{kind}"
        parts[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return parts, (table[codes.view(-1, 64).int()] * largest[:, None]).view(weight.shape)

    return pack
