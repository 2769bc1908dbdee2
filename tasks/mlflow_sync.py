"""Keep the MLflow run of a recipe in agreement with the store.

`MlflowRunSync.sync` is idempotent: it sends only what MLflow lacks. A resumed or repeated pipeline continues its run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.atomic import write_text
from gpt2.config.run import RunConfig
from gpt2.config.strict_yaml import dump
from gpt2.errors import without_credentials
from gpt2.plan import Plan
from gpt2.stage.directory import Provenance, is_finished
from gpt2.stage.facts import DownloadFacts, EvaluateFacts, HarnessFacts, TokenizeFacts, TrainFacts
from gpt2.stage.manifest import MANIFEST, METRICS, PROVENANCE, Manifest, Request, read_model
from gpt2.version import git_commit
from tasks.environment import tracking_uri
from tasks.metrics_upload import HistoryMismatch, MetricsUpload
from tasks.mlflow_content import PARAM_LENGTH, TRAIN_DIGEST, data_set, flatten, stage_metrics
from tasks.mlflow_runs import IDENTITY, client, find_or_create

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ABANDONED, REPLACES = "gpt2.abandoned", "gpt2.replaces"
"""tags: on a run, its steps that training discarded; on its successor, the run that has them"""


class MlflowRunSync:
    """Sends a recipe's tags, parameters, metrics and report from the store to its MLflow run.

    The run's identity is the recipe's name and the training's address, kept as a tag: the same weights have the same
    run, however they are evaluated or reported. A training that resumes or is repeated with other losses gets a new run
    with the same identity; the old run is marked with the discarded steps.
    """

    def __init__(self, config: RunConfig, plan: Plan, store: Path, tags: dict[str, str] | None = None) -> None:
        self.config = config
        self.plan = plan
        self.store = store
        self.uri = tracking_uri(store)
        self.identity = f"{config.name} {plan.train.address}"
        self.metrics = store / plan.train.address / METRICS
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._tags = tags or {}
        self._upload: MetricsUpload | None = None
        """to the current run; None: look the run up in MLflow again"""
        self._train_digest: str | None = None
        """of the training whose results the run has"""
        self._replaces: str | None = None
        self._sent: dict[str, Any] = {}
        """<store>/.mlflow/<run>.json: what MLflow has of tags, parameters, facts and report, and the run's status"""
        self._client: MlflowClient | None = None

    @property
    def mlflow(self) -> MlflowClient:
        if self._client is None:
            self._client = client(self.uri)
        return self._client

    @property
    def page(self) -> str | None:
        """URL of the run's page; None before the first `sync`, and for a database file."""
        if self.run_id is None or not self.uri.startswith("http"):
            return None
        return f"{without_credentials(self.uri).rstrip('/')}/{self.fragment}"

    @property
    def fragment(self) -> str:
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}"

    def sync(self) -> None:
        """Send new tags, parameters and metrics, and of finished stages metrics, data set and report.

        Raises:
            Exception: any error of MLflow's client; the next call continues.
        """
        try:
            run_id, upload = self._find_run()
            self._send_tags(run_id)
            self._send_parameters(run_id)
            upload.send()
        except HistoryMismatch:
            self._upload = None
            self.sync()  # finds or creates another run
            return
        except BaseException:
            self._upload = None  # MLflow may or may not have stored the last batch
            raise
        self._send_data_set(run_id)
        self._send_facts(run_id)
        self._send_report(run_id)

    def set_status(self, status: str) -> None:
        """Set the run's status unless MLflow has it: RUNNING, FINISHED, FAILED or KILLED."""
        if self._sent.get("status") == status:
            return
        assert self.run_id is not None
        if status == "RUNNING":
            self.mlflow.update_run(self.run_id, status=status)
        else:
            self.mlflow.set_terminated(self.run_id, status=status)
        self._record("status", status)

    # ------------------------------------------------------------------------------------------------------ the run

    def _find_run(self) -> tuple[str, MetricsUpload]:
        """The run whose history metrics.jsonl continues, created if there is none."""
        if self.run_id and self._upload is not None and not self._has_other_weights(self._train_digest):
            return self.run_id, self._upload
        uploads: dict[str, MetricsUpload] = {}
        run = find_or_create(
            self.mlflow,
            self.store,
            self.uri,
            self.identity,
            f"{self.config.name} {self.plan.train.address.rpartition('/')[2][:8]}",
            {"mlflow.source.name": "flows/reproduce.py"},
            lambda run: self._continues(run, uploads),
        )
        run_id = str(run.info.run_id)
        self.experiment_id, self.run_id = run.info.experiment_id, run_id
        self._train_digest = run.data.tags.get(TRAIN_DIGEST)
        self._sent = self._read_record(run_id)
        self._record("identity", self.identity)  # at once: a run without a record belongs to another store
        self._upload = uploads.get(run_id) or MetricsUpload(self.mlflow, run, self.metrics)
        return run_id, self._upload

    def _has_other_weights(self, digest: str | None) -> bool:
        """Whether `digest` is of another training than the finished one in the store."""
        if digest is None or (finished := self._finished(self.plan.train)) is None:
            return False
        return digest != finished[0].digest

    def _continues(self, run: Run, uploads: dict[str, MetricsUpload]) -> bool:
        """Whether the run has the losses of this store's training, at all steps that both have.

        It may belong to another store on the same server, or to an earlier training at the same address.
        """
        if self._has_other_weights(run.data.tags.get(TRAIN_DIGEST)):
            return False
        upload = MetricsUpload(self.mlflow, run, self.metrics)
        has_record = self._record_path(run.info.run_id).exists()
        try:
            common = upload.compare()
        except HistoryMismatch as mismatch:
            if has_record and TRAIN_DIGEST in run.data.tags:
                self._replaces = self._replaces or f"{run.info.run_id}: an earlier training at the same address"
                if run.info.status == "RUNNING":  # set when this session started, before its first loss
                    self.mlflow.set_terminated(run.info.run_id, status="FINISHED")
            elif has_record:
                self._abandon(run, mismatch.step, upload.last_step)
            return False
        uploads[run.info.run_id] = upload
        return has_record or common

    def _abandon(self, run: Run, step: int, last: int) -> None:
        """Mark the steps of a run that training discarded."""
        self._replaces = self._replaces or f"{run.info.run_id} from step {step} on"
        if ABANDONED in run.data.tags:
            return
        run_id, steps = run.info.run_id, f"steps {step} to {last}"
        self.mlflow.update_run(run_id, name=f"{run.info.run_name} abandoned at step {step}")
        self.mlflow.set_tag(
            run_id,
            "mlflow.note.content",
            f"**Abandoned: {steps}.** Training resumed from an earlier step and computed other losses. "
            f"The newest run with {IDENTITY} = `{self.identity}` has all steps.",
        )
        if run.info.status == "RUNNING":
            self.mlflow.set_terminated(run_id, status="KILLED")
        # last: it marks the changes above as complete
        self.mlflow.set_tag(run_id, ABANDONED, f"{steps}: training resumed from an earlier step with other losses")

    # --------------------------------------------------------------------------------------------------- the record

    def _record_path(self, run_id: str) -> Path:
        return self.store / ".mlflow" / f"{run_id}.json"

    def _read_record(self, run_id: str) -> dict[str, Any]:
        try:
            record = json.loads(self._record_path(run_id).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _record(self, key: str, value: Any) -> None:
        assert self.run_id is not None
        self._sent[key] = value
        write_text(self._record_path(self.run_id), json.dumps(self._sent))

    def _finished(self, request: Request) -> tuple[Manifest, Provenance] | None:
        directory = self.store / request.address
        if not is_finished(directory):
            return None
        return read_model(directory / MANIFEST, Manifest), read_model(directory / PROVENANCE, Provenance)

    # -------------------------------------------------------------------------------------------------------- sending

    def _send_tags(self, run_id: str) -> None:
        tags = {
            "gpt2.recipe": self.config.name,
            **{f"gpt2.address.{name}": request.address for name, request in self.plan.requests().items()},
            "mlflow.source.git.commit": git_commit() or "",
            **self._tags,
            **({REPLACES: self._replaces} if self._replaces else {}),
        }
        links = [f"**{key}**: {value}" for key, value in self._tags.items() if value.startswith("http")]
        tags["mlflow.note.content"] = "  \n".join([f"`{self.store / self.plan.report.address}`", *links])
        if self._sent.get("tags") == tags:
            return
        from mlflow.entities import RunTag

        self.mlflow.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
        self._record("tags", tags)

    def _send_parameters(self, run_id: str) -> None:
        tree = self.config.model_dump(mode="json")
        parameters = flatten(tree)
        if self._sent.get("parameters") == parameters:
            return
        from mlflow.entities import Param

        sent = self.mlflow.get_run(run_id).data.params
        # MLflow refuses to change one; the training's never differ within a run, because its address is the identity.
        new = [Param(key, value[:PARAM_LENGTH]) for key, value in parameters.items() if key not in sent]
        for start in range(0, len(new), 100):
            self.mlflow.log_batch(run_id, params=new[start : start + 100])
        self.mlflow.log_text(run_id, dump(tree), "config.yaml")
        self._record("parameters", parameters)

    def _send_data_set(self, run_id: str) -> None:
        address = self.plan.tokenize.address
        if self._sent.get("data_set") == address or not (finished := self._finished(self.plan.tokenize)):
            return
        corpus = self._finished(self.plan.download)
        corpus_facts = corpus[0].facts if corpus else None
        assert isinstance(finished[0].facts, TokenizeFacts)
        assert isinstance(corpus_facts, DownloadFacts | None)
        data = data_set(self.config.tokenize.prefix, self.plan, finished[0].facts, corpus_facts)
        self.mlflow.log_inputs(run_id, datasets=[data])
        self._record("data_set", address)

    def _send_facts(self, run_id: str) -> None:
        from mlflow.entities import Metric

        step = self.config.train.max_steps
        for request in (self.plan.train, self.plan.evaluate, self.plan.harness):
            if request is None or not (finished := self._finished(request)):
                continue
            manifest, provenance = finished
            if self._sent.get(f"facts.{request.stage}") == manifest.digest:
                continue
            assert isinstance(manifest.facts, TrainFacts | EvaluateFacts | HarnessFacts)
            time_ms = int(provenance.ended * 1000)
            metrics = [Metric(key, value, time_ms, step) for key, value in stage_metrics(manifest.facts).items()]
            self.mlflow.log_batch(run_id, metrics=metrics)
            if request.stage == "train":
                self.mlflow.set_tag(run_id, TRAIN_DIGEST, manifest.digest)
                self._train_digest = manifest.digest
            self._record(f"facts.{request.stage}", manifest.digest)

    def _send_report(self, run_id: str) -> None:
        if not (finished := self._finished(self.plan.report)) or self._sent.get("report") == finished[0].digest:
            return
        directory = self.store / self.plan.report.address
        for entry in finished[0].files:
            folder = (Path("report") / entry.path).parent
            self.mlflow.log_artifact(run_id, str(directory / entry.path), folder.as_posix())
        self._record("report", finished[0].digest)
