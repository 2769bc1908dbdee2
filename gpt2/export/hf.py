"""A checkpoint for the rest of the field: a Hugging Face folder, or llm.c's file.

    python -m gpt2.export CHECKPOINT OUT                       a folder for transformers, with tokenizer and model card
    python -m gpt2.export CHECKPOINT OUT --format llmc         llm.c, version 3 (fp32, bit for bit)
    python -m gpt2.export CHECKPOINT OUT --format llmc-bf16    llm.c, version 5
    python -m gpt2.export CHECKPOINT OUT --push user/name      the folder, and then to the Hub; the token is HF_TOKEN

With --push an OUT that is CHECKPOINT's export already is pushed as it is, so one can read and edit the card before.

CHECKPOINT is anything that `gpt2.model.load.resolve` knows, so this also converts OpenAI's GPT-2 to llm.c and back.

GGUF comes from llama.cpp's own converter: `python convert_hf_to_gguf.py OUT --outfile model.gguf`. It is in llama.cpp's
repository and in the source distribution of llama-cpp-python (0.3.36 was tried); the package gguf does not have it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2.architecture import MODEL_CONFIG, hf_config, resolve
from gpt2.atomic import fsync_dir, write_text
from gpt2.config.train import ModelConfig
from gpt2.errors import UserError, without_credentials
from gpt2.export import model_card
from gpt2.machine import environment
from gpt2.model.checkpoint import WEIGHTS
from gpt2.model.gpt import GPT
from gpt2.model.llmc import write_llmc
from gpt2.model.load import read_any
from gpt2.model.safetensors_file import read_tensors, write_tensors
from gpt2.model.weights import load_hf, to_hf
from gpt2.runs import find
from gpt2.tokenizer import EOT, VOCAB_SIZE, gpt2_files

END_OF_TEXT = "<|endoftext|>"
LLMC_VERSIONS = {"llmc": 3, "llmc-bf16": 5}
TOKEN_VARIABLE = "HF_TOKEN"


def export_hf(checkpoint: Path, out: Path, *, name: str | None = None) -> Path:
    """Write folder `out` as transformers' AutoModelForCausalLM, AutoTokenizer and pipeline read it, in fp32.

    Args:
        checkpoint: see `gpt2.model.load.resolve`.
        out: must not exist, or be empty; it is there whole or not at all.
        name: of the model on its card, after "gpt2-"; None: its recipe's.

    Returns:
        `out`.

    Raises:
        UserError: there is no model at `checkpoint`, or something at `out`.
    """
    _refuse_existing(out)
    config, weights = _read(checkpoint)
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        write_tensors(folder / WEIGHTS, weights)
        has_tokenizer = config.vocab_size == VOCAB_SIZE
        files = {
            MODEL_CONFIG: _config_json(config),
            "generation_config.json": _json(_generation_config(config)),
            "README.md": model_card.render(
                model_card.gather(resolve(checkpoint), config, name), tokenizer=has_tokenizer
            ),
        }
        if has_tokenizer:
            files |= _tokenizer_files(config.block_size)
        for file, text in files.items():
            write_text(folder / file, text)
        if out.exists():
            out.rmdir()  # empty
        folder.rename(out)
        fsync_dir(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return out


def is_export(folder: Path, checkpoint: Path) -> bool:
    """Whether `folder` is what `export_hf` made of `checkpoint`: its architecture and every weight. The card and the
    tokenizer may have been edited.

    Raises:
        UserError: there is no model at `checkpoint`, or the folder's weights are damaged.
    """
    if not all((folder / name).is_file() for name in (MODEL_CONFIG, WEIGHTS)):
        return False
    config, weights = _read(checkpoint)
    if (folder / MODEL_CONFIG).read_text(encoding="utf-8") != _config_json(config):
        return False
    there = read_tensors(folder / WEIGHTS)
    return there.keys() == weights.keys() and all(torch.equal(there[name], weights[name]) for name in weights)


def export_llmc(checkpoint: Path, out: Path, version: int = 3) -> Path:
    """Write an llm.c checkpoint file; see `gpt2.model.llmc`.

    Returns:
        `out`, or `out`/gpt2.bin where `out` is a folder.

    Raises:
        UserError: there is no model at `checkpoint`, or something at the returned path.
    """
    file = out / "gpt2.bin" if out.is_dir() else out
    if file.exists():
        raise UserError(f"{file} exists: delete it, or give another file")
    config, weights = _read(checkpoint)
    write_llmc(file, config, weights, version)
    return file


def push(folder: Path, repo: str, *, public: bool = False) -> str:
    """Upload an exported folder to a model repository on the Hub, made if it is not there, private unless `public`.

    Returns:
        Address of the commit.

    Raises:
        UserError: HF_TOKEN is not set, or the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    token = environment(TOKEN_VARIABLE)
    if not token:
        raise UserError(f"{TOKEN_VARIABLE} is not set: give a token with write access as {TOKEN_VARIABLE}=... in front")
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload model").commit_url)
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise UserError(f"{folder} is written, but {repo} was not updated: {str(error).splitlines()[0]}") from error


def _refuse_existing(out: Path) -> None:
    if _holds_something(out):
        raise UserError(f"{out} exists: delete it, or give another folder")


def _holds_something(out: Path) -> bool:
    return out.exists() and not (out.is_dir() and not any(out.iterdir()))


def _read(checkpoint: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Through a model, which checks every name and shape and drops what is not GPT-2's."""
    config, weights = read_any(checkpoint)
    model = GPT(config)
    load_hf(model, weights)
    return config, to_hf(model)


def _config_json(config: ModelConfig) -> str:
    return _json(hf_config(config) | {"dtype": "float32"})


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    end = config.vocab_size - 1
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "do_sample": True, "top_k": 50}


def _tokenizer_files(block_size: int) -> dict[str, str]:
    """GPT-2's tokenizer by the names that transformers, slow or fast, of version 4 or 5, looks for."""
    source = {name: data.decode("utf-8") for name, data in gpt2_files().items()}
    merges = source["vocab.bpe"].split("\n")[1:]  # after "#version: 0.2"
    end = {"content": END_OF_TEXT, "lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": EOT, **end, "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": json.loads(source["encoder.json"]),
            "merges": [merge for merge in merges if merge],
        },
    }
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "add_bos_token": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "vocab.json": source["encoder.json"],
        "merges.txt": source["vocab.bpe"],
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": _json(tokenizer_config),
        "special_tokens_map.json": _json(dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)),
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gpt2.export", description="A checkpoint for other programs.")
    parser.add_argument(
        "places",
        nargs="+",
        metavar="checkpoint out",
        help="checkpoint folder, Hugging Face folder, llm.c file or finished stage; then the folder to make, or file "
        "for llm.c; with --recipe: out, then field=value ...",
    )
    parser.add_argument("--recipe", help="the model that this recipe trained, with the overrides given")
    parser.add_argument("--format", choices=["hf", *LLMC_VERSIONS], default="hf")
    parser.add_argument("--name", help="of the model on its card, after gpt2-")
    parser.add_argument("--push", metavar="USER/NAME", help=f"then upload it to the Hub; needs {TOKEN_VARIABLE}")
    parser.add_argument("--public", action="store_true", help="make a repository that is pushed to public")
    args = parser.parse_intermixed_args(argv)
    if args.recipe is not None:
        args.checkpoint, args.out = find(args.recipe, args.places[1:]), Path(args.places[0])
    elif len(args.places) == 2:
        args.checkpoint, args.out = map(Path, args.places)
    else:
        raise UserError(f"a checkpoint and an output are needed, {len(args.places)} paths are given")
    if args.push and args.format != "hf":
        raise UserError(f"--push uploads the folder of --format hf, not of {args.format}")
    if args.push and not environment(TOKEN_VARIABLE):
        raise UserError(f"--push needs a token with write access in the environment, as {TOKEN_VARIABLE}")
    if args.push and _holds_something(args.out):
        if not is_export(args.out, args.checkpoint):
            raise UserError(
                f"{args.out} exists and is not {args.checkpoint}'s export: delete it, or give another folder"
            )
        print(f"{args.out} is there already and is pushed as it is: {', '.join(sorted(os.listdir(args.out)))}")
    elif args.format == "hf":
        print(export_hf(args.checkpoint, args.out, name=args.name))
    else:
        print(export_llmc(args.checkpoint, args.out, LLMC_VERSIONS[args.format]))
    if args.push:
        print(without_credentials(push(args.out, args.push, public=args.public)))
