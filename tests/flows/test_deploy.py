"""The cluster files: the Slurm script with stand-ins for Slurm's commands, and the Kubernetes manifest's command."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from tiny_run import assert_same, make_run, result, run, set_runtime, steps

DEPLOY = ROOT / "deploy"
SRUN = """#!/bin/bash
# stands in for srun: the command once a node, here all on one machine; signals are passed on
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM $(jobs -p)' TERM
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do "$@" & done
status=0
for job in $(jobs -p); do
  wait "$job" || status=$?
  while kill -0 "$job" 2>/dev/null; do status=0; wait "$job" || status=$?; done
done
exit $status
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" >>"$REQUEUED"; else echo localhost; fi
"""


@pytest.mark.slow
def test_the_slurm_script_trains_saves_and_goes_on(tmp_path: Path) -> None:
    """Bugs: a signal that never reaches torchrun, an endpoint on which the nodes do not meet, a job that is told to
    end and takes that for a failure. Two nodes, then SIGTERM to the script as Slurm sends it, then the same again."""
    directory = make_run(tmp_path / "store")
    set_runtime(directory, log_every=1)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",  # as in an activated environment
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "GPUS_PER_NODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }

    def script() -> subprocess.Popen[str]:
        words = ["bash", str(DEPLOY / "slurm.sbatch"), str(directory)]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = script()
    assert first.stdout is not None
    before = []
    for line in first.stdout:
        before.append(line)
        if "step 4/12  val loss" in line:
            os.kill(first.pid, signal.SIGTERM)
            break
    else:
        pytest.fail("ended before it was told to:\n" + "".join(before))
    rest = first.stdout.read()
    assert first.wait(60) != 0 and steps(directory)[-1] >= 4, rest
    assert "everything is saved" in rest and (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"
    second = script()
    output, _ = second.communicate(timeout=100)
    assert second.returncode == 0, output
    assert "resuming after step" in output
    whole = make_run(tmp_path / "whole")
    run(whole, 2)
    assert_same(result(directory), result(whole))


def test_the_kubernetes_manifest_starts_the_same_command() -> None:
    """Bug: a manifest that is no YAML, or drifts from the command that was tried."""
    runtime, job = yaml.safe_load_all((DEPLOY / "trainjob.yaml").read_text())
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    command = job["spec"]["trainer"]["command"]
    slurm = (DEPLOY / "slurm.sbatch").read_text().replace("\\\n", " ")
    words = shlex.split(next(line for line in slurm.splitlines() if "--module gpt2.train" in line).rstrip("& "))
    start = words.index("torchrun")
    assert [word.split("=")[0] for word in words[start:-1]] == [word.split("=")[0] for word in command[:-1]]
    (pod,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert pod["template"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
