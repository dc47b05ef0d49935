"""The weights of several ONNX graphs in one file, each tensor once, written as it is met: never a second copy of the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .errors import LowerError

ALIGN = 64  # bytes; large tensors start on a page so that a runtime can map them
PAGE = 4096


class WeightFile:
    """`place` puts a tensor into the file and says where; the same tensor, or the same arrangement of tensors, is written once.

    With `zeros_for_meta` a tensor without data (device meta) takes its place as a hole in a sparse file: shapes and sizes are right,
    values are 0.
    """

    def __init__(self, path: Path, zeros_for_meta: bool = False) -> None:
        self.path = path
        self.bytes = 0
        self._zeros = zeros_for_meta
        self._places: dict[tuple[object, ...], tuple[int, int]] = {}
        self._alive: list[Tensor] = []  # the keys are addresses: they stay valid while the tensors live
        self._file: BinaryIO | None = path.open("wb")

    def place(self, parts: tuple[Tensor, ...], transpose: bool, dtype: torch.dtype | None = None) -> tuple[int, int]:
        """The tensors concatenated along dim 0 (and then, for matrices, transposed), cast one at a time -> (offset, length) in bytes."""
        dtype = dtype or parts[0].dtype
        key = (
            transpose,
            dtype,
            *[(p.data_ptr() if p.device.type != "meta" else id(p), tuple(p.shape), p.stride(), p.dtype) for p in parts],
        )
        if key not in self._places:
            self._alive += parts
            self._places[key] = self._write(parts, transpose, dtype)
        return self._places[key]

    def _write(self, parts: tuple[Tensor, ...], transpose: bool, dtype: torch.dtype) -> tuple[int, int]:
        length = sum(p.numel() for p in parts) * dtype.itemsize
        align = PAGE if length >= 64 * PAGE else ALIGN
        offset = -(-self.bytes // align) * align
        file = self._open()
        file.seek(offset)
        if any(p.device.type == "meta" for p in parts):
            if not self._zeros:
                raise LowerError(
                    f"to_onnx: a weight of shape {tuple(parts[0].shape)} has no data (device meta); "
                    f"load the model's weights, or lower shapes only"
                )
            file.truncate(offset + length)
        elif transpose:
            whole = parts[0] if len(parts) == 1 else torch.cat([p.detach() for p in parts])
            file.write(_raw(whole.detach().to(dtype).t()))
        else:
            for part in parts:
                file.write(_raw(part.detach().to(dtype)))
        self.bytes = offset + length
        return offset, length

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._alive.clear()
        self._places.clear()

    def _open(self) -> BinaryIO:
        if self._file is None:
            raise LowerError(f"to_onnx: the weight file {self.path.name} is closed")
        return self._file

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def raw_bytes(tensor: Tensor) -> bytes:
    """The tensor's values in C order, little endian: what ONNX calls raw data."""
    return bytes(_raw(tensor.detach())) if tensor.numel() else b""
