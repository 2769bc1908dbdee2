"""What a Prefect server has to know: the work pool, the deployments of prefect.yaml, and what to do with a flow run
whose machine is gone. All of it may be said again at any time."""

from __future__ import annotations

import os
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

ROOT = Path(__file__).parent.parent
POOL = "gpu"
SILENCE = timedelta(seconds=90)
"""after which a flow run counts as crashed; three heartbeats (flows.environment)"""


def announce(api_url: str, store: Path, auth: str | None = None) -> None:
    """Create the work pool, the automation and all deployments on the server at `api_url`; runs write to `store`.

    Args:
        auth: user:password, where the server asks for them

    Raises:
        UserError: a deployment could not be made.
    """
    with temporary_settings(updates={PREFECT_API_URL: api_url, PREFECT_API_AUTH_STRING: auth}):
        with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        _watch_for_silence()
    made = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=ROOT,
        env={
            **os.environ,
            "PREFECT_API_URL": api_url,
            **({"PREFECT_API_AUTH_STRING": auth} if auth else {}),
            "GPT2_STORE": str(store),
            "PWD": str(ROOT),
        },
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise UserError(f"prefect deploy failed: {(made.stderr or made.stdout).strip()[-2000:]}")


def _watch_for_silence() -> None:
    """A flow run that sends no heartbeat any more is marked as crashed, else it would count as running for ever."""
    name = "crash-silent-runs"
    automation: Any = Automation  # its methods are typed as coroutines and run at once where there is no event loop
    with suppress(ValueError):
        automation.read(name=name)
        return
    message = f"no heartbeat for {SILENCE.seconds} s: the process or its machine is gone; run it again to go on"
    over = [f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")]
    automation(
        name=name,
        description="A flow run whose process or machine is gone is marked as crashed.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *over},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[ChangeFlowRunState(name=None, state=StateType.CRASHED, message=message, force=False)],
    ).create()


def crash_running(api_url: str, reason: str, auth: str | None = None) -> int:
    """Mark the flow runs that a stopped worker has left behind as crashed; how many."""
    states = [StateType.RUNNING, StateType.CANCELLING]
    left = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)))
    server = temporary_settings(updates={PREFECT_API_URL: api_url, PREFECT_API_AUTH_STRING: auth})
    with server, get_client(sync_client=True) as client:
        runs = [run for run in client.read_flow_runs(flow_run_filter=left) if run.work_pool_name == POOL]
        for run in runs:
            client.set_flow_run_state(run.id, Crashed(message=reason), force=True)
    return len(runs)
