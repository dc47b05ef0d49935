"""Keys or values as 8-bit floats, E4M3."""

import torch
from torch import Tensor

from ._define import op
from .quantize_kv import spread


@op
def quantize_fp8(x: Tensor, scale: Tensor, block: int) -> Tensor:
    """x[B, G, T, D], scale as `kv_scale` makes it, of max |x| / 448  ->  codes int8[B, G, T, D]: the bytes of float8_e4m3fn(x / scale)

    Round half to even, clamped to +-448; spelt in float arithmetic, so that targets without the type compute the same bytes.
    """
    y = x.float() / spread(scale, x, block).float()
    a = y.abs().clamp(max=448)
    e = a.clamp(min=2.0**-6).log2().floor()
    q = (a / torch.exp2(e - 3)).round()  # 8 to 16 eighths of 2^e; below 8 only where e = -6: subnormal
    e, q = torch.where(q >= 16, e + 1, e), torch.where(q >= 16, 8, q)
    byte = torch.where(q < 8, q, (e + 7) * 8 + q - 8)
    return torch.where(y < 0, byte - 128, byte).to(torch.int8)
