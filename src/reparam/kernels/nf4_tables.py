"""The constants of NF4 and of its double quantization, and the type of its statistics.

The tables are stored, not computed; tests derive them. The levels are quantiles of the normal distribution (Dettmers et
al. 2023, §3), and the dynamic map has 2^e values per sign for each power of ten 10^(e-6), e = 0..6.

Shapes: N blocks, M = ⌈N/256⌉ blocks of statistics.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
TINY = 2.0**-126  # the smallest normal float32: 1/c uses it in place of a smaller c, so 1/c is finite

# The tables hold float32 bits, because decimals would be rounded.
_CODE = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
_DYNAMIC = (  # entries 128 to 255; the negative ones mirror them, entry 127 is zero, and there is no -1
    "3513a3b7 365a1a94 370205ff 37b24206 38378034 388aefb3 38ba1f4b 3923d70b 398ce705 39c7e283 3a016f01 3a1eecc1 "
    "3a3c6a80 3a59e83e 3a7765ff 3aa7ef9d 3af1a9fc 3b1db22d 3b428f5c 3b676c8a 3b8624dd 3b989374 3bab020d 3bbd70a4 "
    "3bcfdf3b 3be24dd3 3bf4bc6a 3c039581 3c0ccccd 3c160418 3c1f3b64 3c3ae148 3c68f5c3 3c8b851f 3ca28f5d 3cb9999a "
    "3cd0a3d7 3ce7ae15 3cfeb852 3d0ae148 3d166667 3d21eb85 3d2d70a3 3d38f5c3 3d447ae1 3d500000 3d5b851f 3d670a3d "
    "3d728f5d 3d7e147b 3d84cccd 3d8a8f5d 3d9051eb 3d96147b 3d9bd70a 3da1999a 3da75c2a 3dad1eb8 3db2e148 3db8a3d7 "
    "3dbe6667 3dc428f7 3dc9eb85 3ddb3334 3df80000 3e0a6666 3e18cccd 3e273333 3e35999a 3e440000 3e526666 3e60cccd "
    "3e6f3333 3e7d9999 3e860000 3e8d3334 3e946666 3e9b999a 3ea2cccc 3eaa0000 3eb13333 3eb86666 3ebf999a 3ec6cccc "
    "3ece0000 3ed53333 3edc6666 3ee3999a 3eeacccc 3ef20000 3ef93332 3f003333 3f03cccc 3f076666 3f0b0000 3f0e999a "
    "3f123334 3f15cccd 3f196666 3f1d0000 3f20999a 3f243334 3f27cccd 3f2b6666 3f2f0000 3f32999a 3f363334 3f39cccd "
    "3f3d6666 3f410000 3f44999a 3f483333 3f4bcccd 3f4f6666 3f530000 3f56999a 3f5a3333 3f5dcccd 3f616666 3f650000 "
    "3f68999a 3f6c3333 3f6fcccd 3f736666 3f770000 3f7a999a 3f7e3333 3f800000"
)


def _floats(words: str) -> list[float]:
    return [struct.unpack(">f", bytes.fromhex(word))[0] for word in words.split()]


CODE = torch.tensor(_floats(_CODE))  # [16]
THRESHOLDS = (CODE[1:] + CODE[:-1]) / 2  # [15]
_positive = _floats(_DYNAMIC)
DYNAMIC = torch.tensor([-v for v in reversed(_positive[:-1])] + [0.0] + _positive)  # [256]


class Statistics(NamedTuple):
    """The largest magnitude of each block: in float32, or doubly quantized (`nested` and `offset` are then given)."""

    absmax: Tensor  # [N] float32, or uint8 if doubly quantized
    nested: Tensor | None = None  # [M] float32: one scale per 256 magnitudes
    offset: Tensor | None = None  # [1] float32: the mean of all magnitudes
    map: Tensor | None = None  # [256] float32: the map from a file, if it is not DYNAMIC
