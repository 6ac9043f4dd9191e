"""The two forms in which all methods keep a linear layer's weights, and how rows are multiplied by them.

`CodedLinear`: weights as codes of 4 or 8 bits with scales per group of inputs; the arithmetic is that of the rows' own
type. `IntegerLinear`: 8-bit weights, and rows rounded to 8 bits as they come. On the CPU the kernels of kernels/cpu.py
multiply, once the weights are packed for them; few rows on a GPU that can, kernels/coded_linear.py. Everything else
dequantizes some outputs at a time and multiplies: that is the reference the tests compare with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from enum import IntEnum

import torch
from torch.nn import functional

from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.kernels.cpu_records import CODES_TOGETHER, CodedWeight, PackedWeight
from textgen_engine.mapped_memory import WeightMemory

# As many weights are dequantized at a time.
_PIECE_WEIGHTS = 4 << 20
# Inputs and groups are multiples of this where the GPU's kernel runs; half bytes are stored in chunks of as many.
KERNEL_MULTIPLE = 32
_INT8_MAX = 127.0
# Tensor cores of this compute capability and above multiply bfloat16, which Triton's kernel may be given.
_LEAST_CAPABILITY = (8, 0)
# More rows are multiplied faster by cuBLAS, by weights dequantized for the occasion.
_MOST_GPU_ROWS = 64
# Rows, code, table, weight, scales, offsets, bias -> results.
GpuKernel = Callable[..., torch.Tensor]
# Shape, type -> memory.
Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def choose_gpu_kernel(capability: tuple[int, int] | None) -> GpuKernel | None:
    """The kernel for coded weights on a GPU of this compute capability (None: there is no GPU), if there is one."""
    if capability is None or capability < _LEAST_CAPABILITY or importlib.util.find_spec("triton") is None:
        return None
    from textgen_engine.kernels.coded_linear import coded_linear

    return coded_linear


class Code(IntEnum):
    """What a weight's code is: a signed byte, half a byte that chooses from a table of 16, or a float8_e4m3fn."""

    INT8 = 0
    NIBBLE = 1
    FLOAT8 = 2


class QuantizedLinear(torch.nn.Module):
    """Stands in for torch.nn.Linear: x [..., in_features] -> [..., out_features].

    On the meta device until weights are loaded; `kernels` is set afterwards, where there are any.
    """

    kernels: CpuKernels | None = None
    for_kernels: PackedWeight | CodedWeight | None = None
    bias: torch.Tensor | None
    weight: torch.Tensor
    scales: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias, requires_grad=False))

    def pack(self, memory: WeightMemory | None = None) -> None:
        """Take the form that the compiled kernels read, on the CPU where there are any. The weight is then gone in its
        plain form."""
        if self.kernels is None or self.for_kernels is not None or self.weight.device.type != "cpu":
            return
        bias = None if self.bias is None else self.bias.detach().float()
        self._pack(self.kernels, bias, None if memory is None else memory.empty)

    def _pack(self, kernels: CpuKernels, bias: torch.Tensor | None, empty: Empty | None) -> None:
        raise NotImplementedError

    def joined_with(self, others: list[QuantizedLinear]) -> QuantizedLinear | None:
        """One layer whose outputs are those of all, one behind the other; None where they cannot be joined."""
        raise NotImplementedError

    def _joined_bias(self, others: list[QuantizedLinear]) -> torch.Tensor | None:
        biases = [layer.bias for layer in (self, *others) if layer.bias is not None]
        return torch.cat(biases) if biases else None


class CodedLinear(QuantizedLinear):
    """Weights as codes. weight: uint8 [out_features, in_features / 2] (half bytes), else [out_features, in_features] of
    int8 or float8_e4m3fn. A weight is table[code] * scale + offset (without a table, the code itself), with scales and
    offsets float32 [out_features, groups], each group being in_features / groups neighbouring inputs, in the order of
    `order` [in_features], if there is one. The order may be longer and name the input in_features, which is none: gaps
    in the codes, so that all groups are of one size.
    """

    gpu_kernel: GpuKernel | None = None  # set beside `kernels`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: torch.Tensor | None,
        *,
        code: Code,
        group_size: int,
        table: torch.Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.code, self.group_size, self.table = code, group_size, table
        self.offsets: torch.Tensor | None = None
        self.order: torch.Tensor | None = None
        dtype = {Code.INT8: torch.int8, Code.NIBBLE: torch.uint8, Code.FLOAT8: torch.float8_e4m3fn}[code]
        width = in_features // 2 if code is Code.NIBBLE else in_features
        self.register_buffer("weight", torch.empty(out_features, width, dtype=dtype, device="meta"))
        scales = torch.empty(out_features, in_features // group_size, dtype=torch.float32, device="meta")
        self.register_buffer("scales", scales)

    def fill(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
    ) -> CodedLinear:
        """Put values in; returns itself."""
        self.weight, self.scales = weight.contiguous(), scales.float().contiguous()
        self.offsets = None if offsets is None else offsets.float().contiguous()
        self.order = order
        return self

    def bring(self, device: torch.device) -> None:
        """Have on the device what goes there with no module: table, offsets, order."""
        for name in ("table", "offsets", "order"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.to(device))

    def dequantized(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """The weights of outputs [begin, end), float32 [end - begin, in_features], inputs in `order`."""
        weight, scales, offsets = self._plain()
        codes = weight[begin:end]
        values = unpack_nibbles(codes) if self.code is Code.NIBBLE else codes
        if self.table is not None:
            values = self.table.to(codes.device)[values.int()]
        groups = values.float().view(values.shape[0], -1, self.group_size) * scales[begin:end, :, None]
        if offsets is not None:
            groups = groups + offsets[begin:end, :, None]
        return groups.view(values.shape)

    def _plain(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes, scales and offsets as `fill` had them, of whatever form they have."""
        if self.for_kernels is None:
            return self.weight, self.scales, self.offsets
        scales, offsets = (
            None if values is None else values.transpose(1, 2).flatten(0, 1)[: self.out_features]
            for values in (self.scales, self.offsets)
        )
        assert scales is not None
        if self.code is Code.NIBBLE:  # [blocks, depth / 8, outputs, 4]
            codes = torch.stack((self.weight & 15, self.weight >> 4), dim=4).flatten(3).transpose(1, 2)
            return pack_nibbles(codes.flatten(2).flatten(0, 1)[: self.out_features]), scales, offsets
        codes = self.weight.transpose(1, 2).flatten(0, 1)[: self.out_features].contiguous()
        return codes.view(torch.int8 if self.code is Code.INT8 else torch.float8_e4m3fn), scales, offsets

    @property
    def can_pack(self) -> bool:
        return self.kernels is not None and self.group_size % CODES_TOGETHER == 0

    def _pack(self, kernels: CpuKernels, bias: torch.Tensor | None, empty: Empty | None) -> None:
        if not self.can_pack:
            return
        self.weight = kernels.pack_codes(int(self.code), self.weight.view(torch.uint8), empty)
        self.scales = kernels.pack_groups(self.scales)
        self.offsets = None if self.offsets is None else kernels.pack_groups(self.offsets)
        table = None
        if self.code is Code.NIBBLE:
            table = (_COUNTING if self.table is None else self.table).contiguous()
        order = None if self.order is None else self.order.contiguous()
        self.for_kernels = CodedWeight(
            self.weight,
            int(self.code),
            self.group_size,
            self.scales,
            self.offsets,
            bias=bias,
            table=table,
            order=order,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.kernels is not None and self.for_kernels is not None:
            in_bfloat16 = x.dtype is torch.bfloat16
            output = self.kernels.linear(rows.float(), self.for_kernels, self.out_features, in_bfloat16=in_bfloat16)
            return output.view(*x.shape[:-1], self.out_features).to(x.dtype)
        if self.order is not None:
            if len(self.order) > self.in_features:
                rows = functional.pad(rows, (0, 1))
            rows = rows.index_select(1, self.order)
        if self.gpu_kernel is not None and self._suits_gpu_kernel(rows):
            output = self.gpu_kernel(
                rows, int(self.code), self.table, self.weight, self.scales, self.offsets, self.bias
            )
        else:
            step = max(1, _PIECE_WEIGHTS // self.in_features)
            pieces = [
                functional.linear(rows, self.dequantized(begin, begin + step).to(rows.dtype))
                for begin in range(0, self.out_features, step)
            ]
            output = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
            if self.bias is not None:
                output = output + self.bias
        return output.view(*x.shape[:-1], self.out_features)

    def _suits_gpu_kernel(self, rows: torch.Tensor) -> bool:
        return rows.shape[0] <= _MOST_GPU_ROWS and self.group_size % KERNEL_MULTIPLE == 0

    def joined_with(self, others: list[QuantizedLinear]) -> CodedLinear | None:
        layers: list[CodedLinear] = [self]
        for other in others:
            alike = isinstance(other, CodedLinear) and (other.code, other.group_size) == (self.code, self.group_size)
            if not alike or (other.bias is None) != (self.bias is None):
                return None
            assert isinstance(other, CodedLinear)
            layers.append(other)
        if any((layer.offsets is None) != (self.offsets is None) for layer in layers):
            return None
        if not all(_equal(layer.order, self.order) and _equal(layer.table, self.table) for layer in layers):
            return None
        joined = CodedLinear(
            self.in_features,
            sum(layer.out_features for layer in layers),
            self._joined_bias(others),
            code=self.code,
            group_size=self.group_size,
            table=self.table,
        )
        joined.kernels, joined.gpu_kernel = self.kernels, self.gpu_kernel
        offsets = [layer.offsets for layer in layers if layer.offsets is not None]
        return joined.fill(
            torch.cat([layer.weight.view(torch.uint8) for layer in layers]).view(self.weight.dtype),
            torch.cat([layer.scales for layer in layers]),
            torch.cat(offsets) if offsets else None,
            self.order,
        )


class IntegerLinear(QuantizedLinear):
    """weight int8 [out_features, in_features], scales float32 [out_features], sums int32 [out_features] of its rows.

    Each row of x is rounded to -127 ... 127 on a scale of its own, its largest value's, so neighbours do not matter.
    """

    sums: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device="meta"))
        self.register_buffer("scales", torch.empty(out_features, dtype=torch.float32, device="meta"))
        self.register_buffer("sums", torch.empty(out_features, dtype=torch.int32, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.kernels is not None and self.for_kernels is not None:
            output = self.kernels.linear(rows.float(), self.for_kernels, self.out_features).to(x.dtype)
        else:
            codes, row_scales = quantize_rows(rows.float())
            output = (self._products(codes) * row_scales[:, None] * self.scales).to(x.dtype)
            if self.bias is not None:
                output = output + self.bias
        return output.view(*x.shape[:-1], self.out_features)

    def _pack(self, kernels: CpuKernels, bias: torch.Tensor | None, empty: Empty | None) -> None:
        self.weight = kernels.pack(self.weight, empty)
        self.for_kernels = PackedWeight(self.weight, bias, self.scales, self.sums)

    def integers(self) -> torch.Tensor:
        """int8 [out_features, in_features], of whatever form the weight has."""
        if self.for_kernels is None:
            return self.weight
        return self.weight.transpose(1, 2).flatten(2).flatten(0, 1)[: self.out_features, : self.in_features]

    def _products(self, codes: torch.Tensor) -> torch.Tensor:
        """codes [num_rows, in_features] times the weights, as float32."""
        if codes.device.type == "cuda" and self.in_features % 8 == 0 and self.out_features % 8 == 0:
            # cuBLAS wants more than 16 rows, in eights.
            padding = max(24, -(-codes.shape[0] // 8) * 8) - codes.shape[0]
            padded = functional.pad(codes.to(torch.int8), (0, 0, 0, padding))
            return torch._int_mm(padded, self.weight.t())[: codes.shape[0]].float()
        return functional.linear(codes, self.weight.float())

    def joined_with(self, others: list[QuantizedLinear]) -> IntegerLinear | None:
        layers: list[IntegerLinear] = [self]
        for other in others:
            if not isinstance(other, IntegerLinear) or (other.bias is None) != (self.bias is None):
                return None
            layers.append(other)
        num_outputs = sum(layer.out_features for layer in layers)
        joined = IntegerLinear(self.in_features, num_outputs, self._joined_bias(others))
        joined.kernels = self.kernels
        joined.weight = torch.cat([layer.weight for layer in layers])
        joined.scales = torch.cat([layer.scales for layer in layers])
        joined.sums = torch.cat([layer.sums for layer in layers])
        return joined


_COUNTING = torch.arange(16, dtype=torch.float32)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def quantize_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row rounded to whole numbers of -127 to 127 (float32) on its own scale: codes, scales [num_rows]."""
    largest = matrix.abs().amax(dim=1)
    factors = torch.where(largest > 0, _INT8_MAX / largest, torch.zeros_like(largest))
    return (matrix * factors[:, None]).round(), largest / _INT8_MAX


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """codes 0 ... 15 [rows, inputs] -> uint8 [rows, inputs / 2]: in chunks of 32, the first 16 in the low halves."""
    chunks = codes.to(torch.uint8).view(codes.shape[0], -1, 2, 16)
    return (chunks[:, :, 0] | (chunks[:, :, 1] << 4)).reshape(codes.shape[0], -1)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of pack_nibbles; uint8."""
    bytes_ = packed.view(packed.shape[0], -1, 16)
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=2).view(packed.shape[0], -1)
