"""`bitsandbytes-nf4` and `bitsandbytes-fp4`: 4-bit codes from a table of 16, one scale for each 64 weights.

The tables are those of QLoRA (Dettmers et al., 2023) and of bitsandbytes; each weight becomes the nearest entry times
the largest of its 64, as bitsandbytes' functional.quantize_4bit does.
"""

from __future__ import annotations

import torch

from textgen_engine.models.quantization.linear import Code, CodedLinear, pack_nibbles
from textgen_engine.models.quantization.method import LoadMethod

_BLOCK_SIZE = 64
# Quantiles of the normal distribution, 8 above and 7 below an exact zero, as fractions of the largest.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Sign, two bits of exponent and one of mantissa, in twelfths.
_FP4 = tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3))
TABLES = {"bitsandbytes-nf4": torch.tensor(_NF4), "bitsandbytes-fp4": torch.tensor(_FP4)}


class FourBit(LoadMethod):
    bytes_per_weight = 0.5 + 4 / _BLOCK_SIZE

    def __init__(self, name: str) -> None:
        self.name = name
        self._table = TABLES[name]
        self._sorted = self._table.unique()
        # Where two codes stand for one value (fp4's two zeros), the first.
        self._codes = torch.stack([(self._table == value).nonzero()[0, 0] for value in self._sorted]).to(torch.uint8)
        self._bounds = (self._sorted[1:] + self._sorted[:-1]) / 2

    def replacement(self, linear: torch.nn.Linear, name: str) -> CodedLinear | None:
        if linear.in_features % _BLOCK_SIZE:
            return None
        return CodedLinear(
            linear.in_features,
            linear.out_features,
            linear.bias,
            code=Code.NIBBLE,
            group_size=_BLOCK_SIZE,
            table=self._table,
        )

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        blocks = weight.view(weight.shape[0], -1, _BLOCK_SIZE)
        scales = blocks.abs().amax(dim=2)
        fractions = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, :, None]
        nearest = torch.bucketize(fractions, self._bounds.to(weight.device), out_int32=True)
        codes = self._codes.to(weight.device)[nearest].view(weight.shape)
        return {"weight": pack_nibbles(codes), "scales": scales}
