"""What MLflow shows of a run of the pipeline, made to agree with the store.

`Mirror.sync` may be called at any time: what MLflow has is not sent again, so a resumed or repeated pipeline goes on
with its MLflow run and never doubles it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.atomic import write_text
from gpt2.config.run import RunConfig
from gpt2.config.strict_yaml import dump
from gpt2.errors import UserError, without_credentials
from gpt2.plan import Plan
from gpt2.stage.directory import Provenance, is_finished
from gpt2.stage.facts import EvaluateFacts, HarnessFacts, TokenizeFacts, TrainFacts
from gpt2.stage.manifest import MANIFEST, METRICS, PROVENANCE, Manifest, Request, read_model
from gpt2.version import git_commit
from tasks.curves import Curves, Departed, damaged_line
from tasks.mlflow_runs import IDENTITY, client, find_or_create, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TRAINED = "gpt2.digest.train"
"""tag: digest of the training's manifest"""
ABANDONED, REPLACES = "gpt2.abandoned", "gpt2.replaces"
"""tags: the steps of a course that training gave up, and on the run that goes on instead, the run that has them"""
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
    run, whatever is evaluated or reported of them later. A training that goes back and takes another course, or is
    repeated with other losses, gets a new run of the same identity; the old one is marked with the steps given up.
    """

    def __init__(self, config: RunConfig, plan: Plan, store: Path, tags: dict[str, str] | None = None) -> None:
        self.config = config
        self.plan = plan
        self.store = store
        self.uri = tracking_uri(store)
        self.identity = f"{config.name} {plan.train.address}"
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._tags = tags or {}
        self._curves: Curves | None = None
        """of the run in use; None: MLflow is to be asked which run that is, and what it has"""
        self._trained: str | None = None
        """digest of the training whose results the run holds"""
        self._replaced: str | None = None
        self._sent: dict[str, Any] = {}
        """what MLflow was told, in <store>/.mlflow/<run>.json: of tags, facts and report the version, and the status"""
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
        try:
            curves = self._find_run()
            self._send_tags()
            self._send_parameters()
            curves.send()
        except Departed:
            self._curves = None
            self.sync()  # on another run
            return
        except BaseException as error:
            self._curves = None  # whether the last batch arrived, MLflow knows
            if isinstance(error, json.JSONDecodeError):
                raise UserError(f"{self.metrics}, {damaged_line(self.metrics)}") from error
            raise
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

    def _find_run(self) -> Curves:
        """The run that metrics.jsonl goes on with, made if there is none; what of its curves MLflow has."""
        if self._curves is not None and not self._holds_other_weights(self._trained):
            return self._curves
        found: dict[str, Curves] = {}
        run = find_or_create(
            self.mlflow,
            self.store,
            self.uri,
            self.identity,
            f"{self.config.name} {self.plan.train.address.rpartition('/')[2][:8]}",
            {"mlflow.source.name": "flows/reproduce.py"},
            lambda run: self._goes_on_with(run, found),
        )
        self.experiment_id, self.run_id = run.info.experiment_id, run.info.run_id
        self._trained = run.data.tags.get(TRAINED)
        self._sent = self._remembered(run.info.run_id)
        self._remember("identity", self.identity)  # at once: a run without notes is another store's
        self._curves = found.get(run.info.run_id) or Curves(self.mlflow, run, self.metrics)
        return self._curves

    def _holds_other_weights(self, digest: str | None) -> bool:
        """Whether a run with results of the training `digest` is of other weights than the finished training's."""
        if digest is None or (done := self._finished(self.plan.train)) is None:
            return False
        return digest != done[0].digest

    def _goes_on_with(self, run: Run, found: dict[str, Curves]) -> bool:
        """Whether the run has the curves of this store's training, as far as both have come.

        It may be another store's on the same server, or of a training that this store had at the same address.
        """
        if self._holds_other_weights(run.data.tags.get(TRAINED)):
            return False
        curves = Curves(self.mlflow, run, self.metrics)
        ours = self._notes(run.info.run_id).exists()
        try:
            common = curves.compare()
        except Departed as departed:
            if ours:
                self._abandon(run, departed.step, curves.last_step)
            return False
        found[run.info.run_id] = curves
        return ours or common

    def _abandon(self, run: Run, step: int, last: int) -> None:
        """Say on a run which of its steps are not of the training that goes on."""
        self._replaced = self._replaced or f"{run.info.run_id} from step {step} on"
        if ABANDONED in run.data.tags:
            return
        run_id, steps = run.info.run_id, f"steps {step} to {last}"
        why = "training went back to an earlier step and has other losses since"
        self.mlflow.update_run(run_id, name=f"{run.info.run_name} abandoned at step {step}")
        self.mlflow.set_tag(
            run_id,
            "mlflow.note.content",
            f"**Abandoned: {steps}.** {why[0].upper()}{why[1:]}. "
            f"The whole course is in the newest run with {IDENTITY} = `{self.identity}`.",
        )
        if run.info.status == "RUNNING":
            self.mlflow.set_terminated(run_id, status="KILLED")
        self.mlflow.set_tag(run_id, ABANDONED, f"{steps}: {why}")  # last: it says that all of this is done

    @property
    def metrics(self) -> Path:
        return self.store / self.plan.train.address / METRICS

    def _notes(self, run_id: str) -> Path:
        return self.store / ".mlflow" / f"{run_id}.json"

    def _remembered(self, run_id: str) -> dict[str, Any]:
        try:
            notes = json.loads(self._notes(run_id).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    def _remember(self, key: str, value: Any) -> None:
        assert self.run_id is not None
        self._sent[key] = value
        write_text(self._notes(self.run_id), json.dumps(self._sent))

    # ------------------------------------------------------------------------------------------------- what is sent

    def _send_tags(self) -> None:
        requests = self.plan.requests()
        tags = {
            "gpt2.recipe": self.config.name,
            **{f"gpt2.address.{name}": request.address for name, request in requests.items()},
            "mlflow.source.git.commit": git_commit() or "",
            **self._tags,
            **({REPLACES: self._replaced} if self._replaced else {}),
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
