"""What MLflow shows of a run of the pipeline, made to agree with the store.

`Mirror.sync` may be called as often as one likes: what is there already is not sent again, so a resumed or repeated
pipeline goes on with its MLflow run and never doubles it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.atomic import write_text
from gpt2.config import RunConfig
from gpt2.errors import without_credentials
from gpt2.manifest import (
    MANIFEST,
    METRICS,
    PROVENANCE,
    EvaluateFacts,
    HarnessFacts,
    Manifest,
    Request,
    TokenizeFacts,
    TrainFacts,
    read_model,
)
from gpt2.metrics import NOT_METRICS
from gpt2.plan import Plan
from gpt2.stage import Provenance, is_finished
from gpt2.strict_yaml import dump
from gpt2.version import git_commit
from tasks.mlflow_runs import IDENTITY, client, find_or_create, tracking_uri
from tasks.progress import Tail

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRAINED = "gpt2.digest.train"
"""tag: digest of the training's manifest"""
BATCH = 1000
"""metrics a request: MLflow's own limit"""
PARAM_LENGTH = 6000
"""MLflow's own limit"""


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """{"train": {"optim": {"max_lr": 6e-4}}} -> {"train.optim.max_lr": "0.0006"}; lists stay whole, as JSON."""
    if isinstance(tree, dict) and tree:
        flat: dict[str, str] = {}
        for key, value in tree.items():
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: tree if isinstance(tree, str) else json.dumps(tree)}


def evaluated(facts: EvaluateFacts) -> dict[str, float | None]:
    """evaluate/*: the figures of an evaluation under the names that every MLflow run has them."""
    figures: dict[str, float | None] = {"evaluate/val_loss": facts.val_loss}
    for name, score in facts.scores.items():
        figures |= {f"evaluate/{name}/{figure}": value for figure, value in score.figures().items()}
    return figures


class Mirror:
    """Makes the MLflow run of a configuration agree with the store.

    The run's identity is the recipe's name and the address of its training, kept as a tag: the same weights, the same
    run, whatever is evaluated or reported of them later.
    """

    def __init__(self, config: RunConfig, plan: Plan, store: Path, tags: dict[str, str] | None = None) -> None:
        self.config = config
        self.plan = plan
        self.store = store
        self.uri = tracking_uri(store)
        self.identity = f"{config.name} {plan.train.address}"
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._trained: str | None = None
        """digest of the training whose figures the run has"""
        self._tags = tags or {}
        self._tail = Tail(store / plan.train.address / METRICS)
        self._sent: dict[str, Any] = {}
        """what MLflow was told, in <store>/.mlflow/<run>.json: steps (metric -> highest step), and of tags, facts and
        report the version, and the status"""
        self._client: MlflowClient | None = None

    @property
    def mlflow(self) -> MlflowClient:
        if self._client is None:
            self._client = client(self.uri)
        return self._client

    @property
    def page(self) -> str | None:
        """Address of the run's page; None while nothing is known of it, or where a database file has no page."""
        if self.run_id is None or not self.uri.startswith("http"):
            return None
        return f"{without_credentials(self.uri).rstrip('/')}/{self.fragment}"

    @property
    def fragment(self) -> str:
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}"

    def sync(self) -> None:
        """Send whatever is new: tags, parameters, metrics, and of finished stages facts, data set and report.

        Raises:
            Exception: whatever MLflow raises when it cannot be reached; the next call goes on where this one ended.
        """
        self._find_run()
        self._leave_run_of_earlier_weights()
        self._send_tags()
        self._send_parameters()
        self._send_metrics()
        self._send_data_set()
        self._send_facts()
        self._send_report()

    def set_status(self, status: str) -> None:
        """RUNNING, FINISHED, FAILED or KILLED; nothing is sent where that is known."""
        if self._sent.get("status") == status:
            return
        assert self.run_id is not None
        if status == "RUNNING":
            self.mlflow.update_run(self.run_id, status=status)
        else:
            self.mlflow.set_terminated(self.run_id, status=status)
        self._remember("status", status)

    # ------------------------------------------------------------------------------------------------------ the run

    def _find_run(self) -> None:
        if self.run_id is not None:
            return
        run = find_or_create(
            self.mlflow,
            self.store,
            self.uri,
            self.identity,
            f"{self.config.name} {self.plan.train.address.rpartition('/')[2][:8]}",
            {"mlflow.source.name": "flows/reproduce.py"},
        )
        self.experiment_id, self.run_id = run.info.experiment_id, run.info.run_id
        self._trained = run.data.tags.get(TRAINED)
        self._sent = self._remembered()
        if "steps" not in self._sent:
            # A run that this store has no notes of: MLflow itself knows how far it is.
            self._sent["steps"] = {
                key: self._last_step(key) for key in run.data.metrics if not key.startswith("system/")
            }

    def _leave_run_of_earlier_weights(self) -> None:
        """A training that was done again under its address gets a run of its own: the curve and the figures of the
        earlier weights stay on theirs, under another identity."""
        done = self._finished(self.plan.train)
        if done is None or self._trained in (None, done[0].digest):
            return
        assert self.run_id is not None and self._trained is not None
        self.mlflow.set_tag(self.run_id, IDENTITY, f"{self.identity} {self._trained[:16]}")
        self.run_id = None
        self._tail = Tail(self._tail.path)
        self._find_run()

    def _last_step(self, key: str) -> int:
        assert self.run_id is not None
        return max((metric.step for metric in self.mlflow.get_metric_history(self.run_id, key)), default=-1)

    @property
    def _notes(self) -> Path:
        return self.store / ".mlflow" / f"{self.run_id}.json"

    def _remembered(self) -> dict[str, Any]:
        try:
            notes = json.loads(self._notes.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    def _remember(self, key: str, value: Any) -> None:
        self._sent[key] = value
        write_text(self._notes, json.dumps(self._sent))

    # ------------------------------------------------------------------------------------------------- what is sent

    def _send_tags(self) -> None:
        requests = self.plan.requests()
        tags = {
            "gpt2.recipe": self.config.name,
            **{f"gpt2.address.{name}": request.address for name, request in requests.items()},
            "mlflow.source.git.commit": git_commit() or "",
            **self._tags,
        }
        links = [f"**{key}**: {value}" for key, value in self._tags.items() if value.startswith("http")]
        tags["mlflow.note.content"] = "  \n".join([f"`{self.store / self.plan.report.address}`", *links])
        if self._sent.get("tags") == tags:
            return
        from mlflow.entities import RunTag

        assert self.run_id is not None
        self.mlflow.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
        self._remember("tags", tags)

    def _send_parameters(self) -> None:
        parameters = flatten(self.config.model_dump(mode="json"))
        if self._sent.get("parameters") == parameters:
            return
        from mlflow.entities import Param

        assert self.run_id is not None
        there = self.mlflow.get_run(self.run_id).data.params
        # MLflow refuses to change one; those of training never differ within a run, for they make its identity.
        new = [Param(key, value[:PARAM_LENGTH]) for key, value in parameters.items() if key not in there]
        for start in range(0, len(new), 100):
            self.mlflow.log_batch(self.run_id, params=new[start : start + 100])
        self.mlflow.log_text(self.run_id, dump(self.config.model_dump(mode="json")), "config.yaml")
        self._remember("parameters", parameters)

    def _send_metrics(self) -> None:
        """Forward the new lines of training's metrics.jsonl under their own times.

        A resumed training writes the steps after its checkpoint again. MLflow would keep both points, so of each
        metric only steps beyond the highest one sent are forwarded.
        """
        from mlflow.entities import Metric

        steps: dict[str, int] = dict(self._sent["steps"])
        batch: list[Metric] = []
        try:
            for line in self._tail.lines():
                step, time_ms = line["step"], int(line["time"] * 1000)
                for key, value in line.items():
                    if key in NOT_METRICS or not isinstance(value, int | float) or step <= steps.get(key, -1):
                        continue
                    batch.append(Metric(key, float(value), time_ms, step))
                    steps[key] = step
                if len(batch) > BATCH - 50:
                    self._send_batch(batch, steps)
                    batch = []
            if batch:
                self._send_batch(batch, steps)
        except BaseException:
            self._tail = Tail(self._tail.path)  # those lines were read and not sent
            raise

    def _send_batch(self, batch: list[Any], steps: dict[str, int]) -> None:
        assert self.run_id is not None
        self.mlflow.log_batch(self.run_id, metrics=batch, synchronous=True)
        self._remember("steps", dict(steps))

    def _finished(self, request: Request) -> tuple[Manifest, Provenance] | None:
        directory = self.store / request.address
        if not is_finished(directory):
            return None
        return read_model(directory / MANIFEST, Manifest), read_model(directory / PROVENANCE, Provenance)

    def _send_data_set(self) -> None:
        if self._sent.get("data_set") == self.plan.tokenize.address or not (done := self._finished(self.plan.tokenize)):
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        facts = done[0].facts
        assert isinstance(facts, TokenizeFacts)
        corpus = self._finished(self.plan.download)
        origin = getattr(corpus[0].facts, "origin", "") if corpus else ""
        data = Dataset(
            name=f"{self.config.tokenize.prefix} {facts.train_tokens:,} tokens",
            digest=self.plan.tokenize.address.rpartition("/")[2],
            source_type="gpt2",
            source=json.dumps(
                {"origin": origin, "corpus": self.plan.download.address, "shards": self.plan.tokenize.address}
            ),
            profile=json.dumps(
                facts.model_dump(mode="json", include={"documents", "train_tokens", "val_tokens", "backend"})
            ),
        )
        assert self.run_id is not None
        self.mlflow.log_inputs(
            self.run_id, datasets=[DatasetInput(data, [InputTag("mlflow.data.context", "training")])]
        )
        self._remember("data_set", self.plan.tokenize.address)

    def _send_facts(self) -> None:
        """final/*: what training ended with; evaluate/* and harness/*: of the finished model."""
        from mlflow.entities import Metric

        for request in (self.plan.train, self.plan.evaluate, self.plan.harness):
            if request is None or not (done := self._finished(request)):
                continue
            if self._sent.get(f"facts.{request.stage}") == done[0].digest:
                continue
            facts, ended = done[0].facts, int(done[1].ended * 1000)
            step = self.config.train.max_steps
            values: dict[str, float | None]
            if isinstance(facts, TrainFacts):
                names = {
                    "train_loss",
                    "val_loss",
                    "tokens",
                    "mfu",
                    "tokens_per_second",
                    "total_seconds",
                    "train_seconds",
                }
                values = {f"final/{key}": value for key, value in facts.model_dump(include=names).items()}
            elif isinstance(facts, HarnessFacts):
                values = {
                    f"harness/{task}/{name}": value
                    for task, figures in facts.figures.items()
                    for name, value in figures.items()
                }
            else:
                assert isinstance(facts, EvaluateFacts)
                values = evaluated(facts)
            metrics = [Metric(key, float(value), ended, step) for key, value in values.items() if value is not None]
            assert self.run_id is not None
            self.mlflow.log_batch(self.run_id, metrics=metrics)
            if isinstance(facts, TrainFacts):
                self.mlflow.set_tag(self.run_id, TRAINED, done[0].digest)
                self._trained = done[0].digest
            self._remember(f"facts.{request.stage}", done[0].digest)

    def _send_report(self) -> None:
        if not (done := self._finished(self.plan.report)) or self._sent.get("report") == done[0].digest:
            return
        assert self.run_id is not None
        directory = self.store / self.plan.report.address
        for entry in done[0].files:
            folder = (Path("report") / entry.path).parent
            self.mlflow.log_artifact(self.run_id, str(directory / entry.path), folder.as_posix())
        self._remember("report", done[0].digest)
