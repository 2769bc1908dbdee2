"""Golden values of training and evaluation: a change of what they compute that comes without a new version of the
stage would be taken from the cache for some users and not for others.

When a change is meant: raise the version of `train` or `evaluate` in gpt2/stage/table.py, then copy the new values.
Integers are exact. Floats have a tolerance that is above the differences between CPUs and torch versions.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file
from tiny_evaluation import evaluation, words_everywhere  # noqa: F401  the second is a fixture
from tiny_run import lines, make_run, run
from token_shards import write_shards

from gpt2.distributed import SINGLE_PROCESS
from gpt2.evaluate.stage import Scores, work
from gpt2.stage.directory import StageDir
from gpt2.stage.facts import EvaluateFacts, TrainFacts
from gpt2.stage.manifest import read_model
from gpt2.stage.table import STAGES
from gpt2.train.loader import Loader, aligned_starts, write_aligned_starts


def digest(*arrays: NDArray[np.int64]) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a, dtype="<i8").tobytes() for a in arrays)).hexdigest()[:16]


def test_golden_order_of_training_data(tmp_path: Path) -> None:
    """Bug: another permutation, seed, epoch or border of the loader at an unchanged address of `train`."""
    paths = write_shards(tmp_path, [1000, 999, 1234], 5)
    write_aligned_starts(paths, 64, tmp_path / "starts.npy", SINGLE_PROCESS)
    orders = {
        "shuffled": Loader(paths, 16, 12, 42, 50_257),
        "another seed": Loader(paths, 16, 12, -7, 50_257),
        "in order": Loader(paths, 16, 12, 42, 50_257, shuffle=False),
        "aligned": Loader(paths, 64, 4, 42, 50_257, starts=tmp_path / "starts.npy"),
    }
    found = {name: digest(*(loader.sequences(step) for step in range(60))) for name, loader in orders.items()}
    batch = orders["aligned"].batch(3, slice(0, 4))
    found["tokens"] = digest(batch.idx.numpy(), batch.targets.numpy())
    found["starts"] = digest(aligned_starts(orders["aligned"].stream, 64))
    assert STAGES["train"].version == 1
    assert found == ORDERS, "raise train's version in gpt2/stage/table.py"


def test_golden_training(tmp_path: Path) -> None:
    """Bug: other initial weights, optimizer, schedule or loss at an unchanged address of `train`."""
    directory = make_run(tmp_path)
    run(directory)
    found = lines(directory / "metrics.jsonl")
    weights = load_file(directory / StageDir(directory).facts(TrainFacts).checkpoint / "model.safetensors")
    assert STAGES["train"].version == 1
    why = "raise train's version in gpt2/stage/table.py"
    for name, values in TRAINING.items():
        assert [line[name] for line in found if name in line] == pytest.approx(values, abs=5e-4), why
    norms = {name: tensor.norm().item() for name, tensor in weights.items() if name in NORMS}
    assert norms == pytest.approx(NORMS, rel=5e-4), why


@pytest.mark.slow
def test_golden_evaluation(tmp_path: Path) -> None:
    """Bug: another loss or another way of scoring at an unchanged address of `evaluate`."""
    directory = evaluation(tmp_path)
    work(StageDir(directory), SINGLE_PROCESS)
    facts = StageDir(directory).facts(EvaluateFacts)
    chosen = read_model(directory / "scores.json", Scores).benchmarks["held-out"].chosen["continuation"]
    assert STAGES["evaluate"].version == 1
    why = "raise evaluate's version in gpt2/stage/table.py"
    assert (facts.val_tokens, facts.scores["held-out"].figures()) == (500, {"acc": 0.25, "acc_norm": 0.25}), why
    assert facts.val_loss == pytest.approx(14.27048, abs=1e-3), why
    assert (chosen.labels, chosen.by_sum, chosen.by_mean) == ("332021312332", "321003123031", "321003123031"), why


ORDERS = {
    "shuffled": "6bad97a28daae07e",
    "another seed": "2914e673cd285722",
    "in order": "df97068295c43024",
    "aligned": "40bcd2b385e64420",
    "tokens": "2e699e6c22fc6be4",
    "starts": "991f5e6f7e3f229b",
}
TRAINING = {
    "train/loss": [
        5.711576, 5.583853, 5.414506, 5.262653, 5.102316, 4.948501,
        4.780487, 4.674202, 4.573184, 4.568453, 4.462675, 4.491266,
    ],
    "train/grad_norm": [
        1.438838, 0.997007, 0.916637, 0.867272, 0.852401, 0.835055,
        0.736028, 0.723639, 0.769769, 0.685241, 0.743212, 0.715778,
    ],
    "val/loss": [5.698447, 5.224511, 4.760847, 4.661931],
}  # fmt: skip
NORMS = {
    "transformer.wte.weight": 3.82945,
    "transformer.wpe.weight": 0.68846,
    "transformer.h.0.attn.c_attn.weight": 1.04574,
    "transformer.h.0.mlp.c_fc.weight": 1.10247,
    "transformer.h.1.ln_1.weight": 3.92716,
    "transformer.h.1.attn.c_proj.weight": 0.40908,
    "transformer.h.1.mlp.c_proj.weight": 0.94317,
    "transformer.h.1.mlp.c_proj.bias": 0.11877,
    "transformer.ln_f.bias": 0.23756,
}
