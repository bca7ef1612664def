"""Decode blocks of GGUF quantisation types to float32 and bfloat16.

Each decoder takes blocks of shape ``(n, bytes per block)`` and returns weights of shape ``(n, weights per block)``,
equal to ``gguf.quants.dequantize`` bit for bit. Source of the layouts: ``ggml-common.h`` of ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_LOW_HALVES: Final = np.uint64(0x0F0F0F0F0F0F0F0F)


def _half(blocks: Bytes, at: int) -> Floats:
    """Return the float16 at byte ``at`` of every block, shape ``(n, 1)``."""
    raw = np.empty((blocks.shape[0], 2), np.uint8)
    raw[:, 0] = blocks[:, at]
    raw[:, 1] = blocks[:, at + 1]
    return raw.view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes, width: int) -> Bytes:
    """Unpack groups of ``width`` bytes: first their low halves, then their high halves; shape ``(n, 2 * bytes)``."""
    n, size = packed.shape
    # Eight bytes at a time, and one column at a time, so that the long axis is the inner loop.
    words = np.ascontiguousarray(packed).view(np.uint64).reshape(n, size // width, width // 8)
    out = np.empty((n, size // width, 2, width // 8), np.uint64)
    for group, word in np.ndindex(words.shape[1:]):
        column = words[:, group, word]
        np.bitwise_and(column, _LOW_HALVES, out=out[:, group, 0, word])
        np.bitwise_and(column >> 4, _LOW_HALVES, out=out[:, group, 1, word])
    return out.view(np.uint8).reshape(n, 2 * size)


def _pairs(packed: Bytes, width: int) -> Bytes:
    """Unpack groups of ``width`` bytes into four planes of 2-bit values; shape ``(n, 4 * bytes)``."""
    n, size = packed.shape
    out = np.empty((n, size // width, 4, width), np.uint8)
    groups = packed.reshape(n, size // width, width)
    for plane in range(4):
        np.right_shift(groups, 2 * plane, out=out[:, :, plane])
    out &= 3
    return out.reshape(n, 4 * size)


def _bit_planes(packed: Bytes) -> Bytes:
    """Unpack 32 bytes into eight planes of 32 single bits; shape ``(n, 256)``."""
    n = packed.shape[0]
    out = np.empty((n, 8, 32), np.uint8)
    for plane in range(8):
        np.right_shift(packed, plane, out=out[:, plane])
    out &= 1
    return out.reshape(n, 256)


def _scaled(q: NDArray[np.uint8] | NDArray[np.int8], scale: Floats, minimum: Floats | None = None) -> Floats:
    """Return ``scale * q - minimum`` with one scale and minimum per group of consecutive weights."""
    out = q.reshape(*scale.shape[:2], -1).astype(np.float32)
    out *= scale.reshape(*scale.shape[:2], 1)
    if minimum is not None:
        out -= minimum.reshape(*scale.shape[:2], 1)
    return out.reshape(q.shape[0], -1)


def _signed(q: Bytes, offset: int) -> NDArray[np.int8]:
    signed = q.view(np.int8)
    signed -= np.int8(offset)
    return signed


def _five_bits(blocks: Bytes, at: int) -> Bytes:
    """Return the 32 five-bit values whose high bits start at byte ``at`` and whose low halves follow."""
    q = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    q <<= 4
    q |= _nibbles(blocks[:, at + 4 : at + 20], 16)
    return q


def _q4_0(blocks: Bytes) -> Floats:
    return _scaled(_signed(_nibbles(blocks[:, 2:], 16), 8), _half(blocks, 0))


def _q4_1(blocks: Bytes) -> Floats:
    return _scaled(_nibbles(blocks[:, 4:], 16), _half(blocks, 0), -_half(blocks, 2))


def _q5_0(blocks: Bytes) -> Floats:
    return _scaled(_signed(_five_bits(blocks, 2), 16), _half(blocks, 0))


def _q5_1(blocks: Bytes) -> Floats:
    return _scaled(_five_bits(blocks, 4), _half(blocks, 0), -_half(blocks, 2))


def _q8_0(blocks: Bytes) -> Floats:
    return _scaled(np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _half(blocks, 0))


def _scales_and_minima(blocks: Bytes) -> tuple[Floats, Floats]:
    """Return the eight scales and minima of Q4_K and Q5_K blocks: packed 6-bit numbers after two float16."""
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minima = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=1)
    return _half(blocks, 0) * scales.astype(np.float32), _half(blocks, 2) * minima.astype(np.float32)


def _q2_k(blocks: Bytes) -> Floats:
    scale = _half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    minimum = _half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    return _scaled(_pairs(blocks[:, 16:80], 32), scale, minimum)


def _q3_k(blocks: Bytes) -> Floats:
    scales = _nibbles(blocks[:, 96:104], 8)
    scales |= _pairs(blocks[:, 104:108], 4) << 4
    q = _pairs(blocks[:, 32:96], 32)
    # The high bit is stored inverted: a clear bit subtracts 4.
    q |= _bit_planes(blocks[:, :32]) << 2
    return _scaled(_signed(q, 4), _half(blocks, 108) * _signed(scales, 32).astype(np.float32))


def _q4_k(blocks: Bytes) -> Floats:
    return _scaled(_nibbles(blocks[:, 16:], 32), *_scales_and_minima(blocks))


def _q5_k(blocks: Bytes) -> Floats:
    q = _bit_planes(blocks[:, 16:48])
    q <<= 4
    q |= _nibbles(blocks[:, 48:], 32)
    return _scaled(q, *_scales_and_minima(blocks))


def _q6_k(blocks: Bytes) -> Floats:
    q = _pairs(blocks[:, 128:192], 32)
    q <<= 4
    q |= _nibbles(blocks[:, :128], 64)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _scaled(_signed(q, 32), _half(blocks, 208) * scales)


def _f32(blocks: Bytes) -> Floats:
    return blocks.view(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view(np.float16).astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


DECODERS: Final[dict[Kind, Callable[[Bytes], Floats]]] = {
    Kind.F32: _f32,
    Kind.F16: _f16,
    Kind.BF16: _bf16,
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q8_0: _q8_0,
    Kind.Q2_K: _q2_k,
    Kind.Q3_K: _q3_k,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
}


def to_float32(blocks: Bytes, kind: Kind) -> Floats:
    """Decode blocks to float32.

    Args:
        blocks: Raw blocks, shape ``(n, bytes per block)``.
        kind: Their quantisation type.

    Returns:
        Weights of shape ``(n, weights per block)``.
    """
    decoder = DECODERS.get(kind)
    if decoder is not None:
        return decoder(blocks)
    return np.asarray(dequantize(blocks, kind), dtype=np.float32).reshape(blocks.shape[0], -1)


def to_bfloat16_bits(values: Floats) -> NDArray[np.uint16]:
    """Round float32 to bfloat16, to nearest and ties to even, and return its bits; same shape."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    carry = bits >> 16
    carry &= 1
    carry += 0x7FFF
    carry += bits
    out = carry.view(np.uint16)[..., 1::2].copy()
    # Rounding a NaN's payload could carry into its exponent or sign.
    if np.isnan(values).any():
        out[np.isnan(values)] = 0x7FC0
    return out
