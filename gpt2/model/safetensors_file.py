"""Reads safetensors files, and writes them in pieces with a running hash.

The format (huggingface/safetensors): a little-endian uint64 length, that many bytes of JSON with each tensor's dtype,
shape and offsets, then the tensors' bytes. The library's writer is not used: it copies all tensors into Python objects
while holding the GIL, which stalls training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt2.atomic import atomic_write
from gpt2.errors import UserError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
PIECE_BYTES = 16 << 20


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write CPU tensors atomically; returns the file's sha256.

    Makes transposed views contiguous one at a time, so the extra memory is that of the largest tensor.

    Raises:
        UserError: no space is left.
    """
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        for piece in _pieces(tensors):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the CPU.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): delete its folder and run again") from error
