"""Reads and writes llm.c's model checkpoint files.

256 little-endian int32 (magic 20240326, version, context, vocabulary, layers, heads, width, padded vocabulary), then
the tensors in the order of `TENSORS`, each stacked over the layers. Version 3 is fp32, version 5 bf16 (llm.c,
train_gpt2.py, `write_model`). Matrices are (out, in), as in `GPT`; Hugging Face's are (in, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2.architecture import LLMC_DTYPES, LLMC_HEADER_BYTES, LLMC_MAGIC, read_llmc_header
from gpt2.atomic import atomic_write
from gpt2.config.train import ModelConfig
from gpt2.errors import UserError
from gpt2.model.weights import TRANSPOSED, WTE

VERSIONS: dict[int, torch.dtype] = {version: getattr(torch, name) for version, name in LLMC_DTYPES.items()}
TENSORS = (  # {} is the layer
    WTE,
    "transformer.wpe.weight",
    "transformer.h.{}.ln_1.weight",
    "transformer.h.{}.ln_1.bias",
    "transformer.h.{}.attn.c_attn.weight",
    "transformer.h.{}.attn.c_attn.bias",
    "transformer.h.{}.attn.c_proj.weight",
    "transformer.h.{}.attn.c_proj.bias",
    "transformer.h.{}.ln_2.weight",
    "transformer.h.{}.ln_2.bias",
    "transformer.h.{}.mlp.c_fc.weight",
    "transformer.h.{}.mlp.c_fc.bias",
    "transformer.h.{}.mlp.c_proj.weight",
    "transformer.h.{}.mlp.c_proj.bias",
    "transformer.ln_f.weight",
    "transformer.ln_f.bias",
)


def write_llmc(path: Path, config: ModelConfig, weights: Mapping[str, Tensor], version: int = 3) -> None:
    """Write `weights` (Hugging Face names and layout) as a llm.c checkpoint.

    Args:
        version: 3 keeps fp32 bit for bit; 5 rounds to bf16, to nearest even.
    """
    header = np.zeros(LLMC_HEADER_BYTES // 4, dtype="<i4")
    header[:8] = (
        LLMC_MAGIC,
        version,
        config.block_size,
        config.vocab_size,
        config.n_layer,
        config.n_head,
        config.n_embd,
        config.padded_vocab_size,
    )
    with atomic_write(path) as file:
        file.write(header.tobytes())
        for name in _names(config):
            tensor = weights[name]
            file.write(_bytes(tensor.t() if name.endswith(TRANSPOSED) else tensor, VERSIONS[version]))
            if name == WTE:
                padding = weights[name].new_zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)
                file.write(_bytes(padding, VERSIONS[version]))


def read_llmc(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a llm.c checkpoint.

    Returns:
        The architecture, and the weights in fp32 by Hugging Face's names and in its layout. The rows of padding are
        left out.

    Raises:
        UserError: no such file, another format or version, inconsistent sizes, or a truncated file.
    """
    config, version, padded = read_llmc_header(path)
    dtype = VERSIONS[version]
    shapes = _shapes(config, padded)
    expected = LLMC_HEADER_BYTES + sum(rows * (columns or 1) for rows, columns in shapes.values()) * dtype.itemsize
    size = path.stat().st_size
    if size != expected:
        raise UserError(
            f"{path} holds {size:,} bytes, its header asks for {expected:,}: copy it again, or write it again"
        )
    weights = {}
    with open(path, "rb") as file:
        file.seek(LLMC_HEADER_BYTES)
        for name, (rows, columns) in shapes.items():
            count = rows * (columns or 1)
            raw = np.fromfile(file, dtype="<i2" if dtype == torch.bfloat16 else "<i4", count=count)
            tensor = torch.from_numpy(raw).view(dtype).float()
            if columns is not None:
                tensor = tensor.view(rows, columns)
            if name == WTE:
                tensor = tensor[: config.vocab_size].clone()
            weights[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    return config, weights


def _names(config: ModelConfig) -> Iterator[str]:
    """Names of the tensors in the file's order."""
    for name in TENSORS:
        if "{}" in name:
            yield from (name.format(layer) for layer in range(config.n_layer))
        else:
            yield name


def _shapes(config: ModelConfig, padded: int) -> dict[str, tuple[int, int | None]]:
    """(rows, columns) of each tensor in the file; columns None for a vector."""
    C = config.n_embd
    by_ending: dict[str, tuple[int, int | None]] = {
        "wte.weight": (padded, C),
        "wpe.weight": (config.block_size, C),
        "c_attn.weight": (3 * C, C),
        "c_attn.bias": (3 * C, None),
        "attn.c_proj.weight": (C, C),
        "c_fc.weight": (4 * C, C),
        "c_fc.bias": (4 * C, None),
        "mlp.c_proj.weight": (C, 4 * C),
    }
    return {
        name: next((shape for ending, shape in by_ending.items() if name.endswith(ending)), (C, None))
        for name in _names(config)
    }


def _bytes(tensor: Tensor, dtype: torch.dtype) -> bytes:
    integers = torch.int16 if dtype == torch.bfloat16 else torch.int32  # numpy has no bf16
    array = tensor.detach().cpu().to(dtype).contiguous().view(integers).numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
