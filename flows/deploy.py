"""Set up a Prefect server, idempotently: the work pool, the deployments of prefect.yaml, and an automation that marks
flow runs without heartbeats as crashed."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Crashed

from gpt2.errors import UserError
from tasks.environment import child_environment

ROOT = Path(__file__).parent.parent
POOL = "gpu"
SILENCE = timedelta(seconds=90)
"""without heartbeats before a flow run is marked as crashed; three heartbeat intervals (flows.environment)"""


def deploy_all(api_url: str, store: Path, auth: str | None = None) -> None:
    """Create the work pool, the automation and all deployments on the server at `api_url`; runs write to `store`.

    Args:
        auth: user:password, if the server requires them.

    Raises:
        UserError: `prefect deploy` fails.
    """
    with temporary_settings(updates={PREFECT_API_URL: api_url, PREFECT_API_AUTH_STRING: auth}):
        with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        _create_heartbeat_automation()
    variables = {"PREFECT_API_URL": api_url, "GPT2_STORE": str(store), "PWD": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=ROOT,
        env=child_environment(overrides=variables | ({"PREFECT_API_AUTH_STRING": auth} if auth else {})),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"prefect deploy failed: {(done.stderr or done.stdout).strip()[-2000:]}")


def _create_heartbeat_automation() -> None:
    """Mark a flow run without heartbeats as crashed; by default it stays Running."""
    name = "crash-silent-runs"
    automation: Any = Automation  # typed as coroutines; without an event loop the methods run synchronously
    with suppress(ValueError):
        automation.read(name=name)
        return
    message = f"no heartbeat for {SILENCE.seconds} s: the process or its machine is gone; run it again to continue"
    final = [f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")]
    automation(
        name=name,
        description="Marks a flow run without heartbeats as crashed.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *final},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[ChangeFlowRunState(name=None, state=StateType.CRASHED, message=message, force=False)],
    ).create()


def crash_orphaned_runs(api_url: str, reason: str, auth: str | None = None) -> int:
    """Mark the flow runs of a stopped worker as crashed; their number."""
    states = [StateType.RUNNING, StateType.CANCELLING]
    unfinished = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)))
    server = temporary_settings(updates={PREFECT_API_URL: api_url, PREFECT_API_AUTH_STRING: auth})
    with server, get_client(sync_client=True) as client:
        runs = [run for run in client.read_flow_runs(flow_run_filter=unfinished) if run.work_pool_name == POOL]
        for run in runs:
            client.set_flow_run_state(run.id, Crashed(message=reason), force=True)
    return len(runs)
