"""The pyfunc model that MLflow stores and serves: prompts in, continuations out.

MLflow stores this file and the package gpt2 with the weights, and imports them from there when it loads the model.
`python -m tasks.log_model` logs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

from gpt2.generate.sample import stream_batch
from gpt2.machine import gpu_names
from gpt2.model.load import load_any

PARAMETERS: dict[str, Any] = {
    "tokens": 100,
    "temperature": 0.8,
    "top_k": 0,  # MLflow's parameters have no None: 0 is all tokens
    "top_p": 1.0,
    "seed": 42,
    "stop": "",  # end before this text
}


class GPT2(PythonModel):
    """Continues prompts, with the parameters of `python -m gpt2.generate`."""

    def load_context(self, context: PythonModelContext) -> None:
        self.model = load_any(Path(context.artifacts["model"]), "cuda" if gpu_names() else "cpu")

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        """The continuation of each prompt, without the prompt; prompt i is sampled with seed + i."""
        options = PARAMETERS | (params or {})
        texts = [""] * len(model_input)
        pieces = stream_batch(
            self.model,
            model_input,
            int(options["tokens"]),
            temperature=float(options["temperature"]),
            top_k=int(options["top_k"]) or None,
            top_p=float(options["top_p"]),
            seed=int(options["seed"]),
            stop=[options["stop"]] if options["stop"] else [],
        )
        for row, piece in pieces:
            texts[row] += piece
        return texts


mlflow.models.set_model(GPT2())
