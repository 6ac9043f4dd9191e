"""Linear layers with coded weights in Triton's language: codes become floats on their way to the tensor cores.

For the few rows of a decode step, which cost what reading the weight costs: in 8 or 4 bits that is a half or a quarter
of what 16-bit weights take. What the codes mean: models/quantization/linear.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Tensor cores multiply no fewer rows.
_ROWS = 16
_OUTPUTS = 32
_BYTES = 64  # of an output's weights at a time
INT8, NIBBLE, FLOAT8 = 0, 1, 2


def coded_linear(
    x: torch.Tensor,
    code: int,
    table: torch.Tensor | None,
    weight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [num_rows, depth] times a coded weight: table float32 [16] or None, weight [num_outputs, bytes], scales and
    offsets float32 [num_outputs, groups], bias [num_outputs] -> [num_rows, num_outputs], in the type of x.

    Sums are float32. Groups are multiples of 32 inputs; depth is one of them.
    """
    num_rows, depth = x.shape
    num_outputs, num_groups = scales.shape
    assert depth % num_groups == 0 and depth // num_groups % 32 == 0
    assert weight.is_contiguous() and scales.is_contiguous() and (offsets is None or offsets.is_contiguous())
    x = x.contiguous()
    output = x.new_empty(num_rows, num_outputs)
    if num_rows:
        codes = weight if code == INT8 else weight.view(torch.uint8)  # 8-bit floats as well, for older devices
        _coded_linear[(triton.cdiv(num_outputs, _OUTPUTS), triton.cdiv(num_rows, _ROWS))](
            *(x, codes, table, scales, offsets, bias, output),
            *(num_rows, depth, num_outputs, depth // num_groups, num_groups),
            CODE=code,
            HAS_TABLE=table is not None,
            HAS_OFFSETS=offsets is not None,
            HAS_BIAS=bias is not None,
            ROWS=_ROWS,
            OUTPUTS=_OUTPUTS,
            BYTES=_BYTES,
            num_warps=4,
        )
    return output


@triton.jit
def _coded_linear(
    x_ptr,
    weight_ptr,
    table_ptr,
    scales_ptr,
    offsets_ptr,
    bias_ptr,
    output_ptr,
    num_rows,
    depth,
    num_outputs,
    group_size,
    num_groups,
    CODE: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
):
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    places = tl.arange(0, BYTES)
    is_output, is_row = outputs < num_outputs, rows < num_rows
    # A half byte's two weights stand 16 apart in a chunk of 32, so the lower halves are multiplied by some columns of
    # x and the upper ones by others.
    row_bytes = depth // 2 if CODE == 1 else depth
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for begin in range(0, row_bytes, BYTES):
        at = begin + places
        is_byte = at < row_bytes
        codes = tl.load(
            weight_ptr + outputs.to(tl.int64)[:, None] * row_bytes + at[None, :],
            mask=is_output[:, None] & is_byte[None, :],
            other=0,
        )
        columns = at // 16 * 32 + at % 16 if CODE == 1 else at
        place = outputs[:, None] * num_groups + (columns // group_size)[None, :]
        mask = is_output[:, None] & is_byte[None, :]
        scale = tl.load(scales_ptr + place, mask=mask, other=0.0)
        offset = tl.load(offsets_ptr + place, mask=mask, other=0.0) if HAS_OFFSETS else 0.0
        for half in tl.static_range(2 if CODE == 1 else 1):
            if CODE == 1:
                index = ((codes >> (4 * half)) & 15).to(tl.int32)
                values = tl.load(table_ptr + index) if HAS_TABLE else index.to(tl.float32)
            elif CODE == 2:  # the bits of a half float that is 256 times too small
                wide = codes.to(tl.uint16)
                bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
                values = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
            else:
                values = codes.to(tl.float32)
            factors = tl.load(
                x_ptr + rows.to(tl.int64)[:, None] * depth + (columns + 16 * half)[None, :],
                mask=is_row[:, None] & is_byte[None, :],
                other=0.0,
            )
            weights = (values * scale + offset).to(factors.dtype)
            sums = tl.dot(factors, tl.trans(weights), sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    tl.store(
        output_ptr + rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :],
        sums.to(output_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_output[None, :],
    )
