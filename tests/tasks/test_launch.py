"""A stage's process ends with its parent, and its failure has one sentence."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from waiting import gone, wait_for, written

from gpt2 import machine
from gpt2.config.runtime import Runtime
from gpt2.errors import UserError
from gpt2.machine import Gpu
from gpt2.stage.failure import Failure, write_failure
from gpt2.stage.table import STAGES
from tasks import launch
from tasks.gpu_locks import lock_gpus

WAITER = """
import os, signal, subprocess, sys, time
from pathlib import Path
here = Path(sys.argv[1])
def leave(number, frame):
    time.sleep(0.3)
    (here / "saved").write_text("saved")
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
(here / "pid").write_text(str(os.getpid()))
while True:
    time.sleep(0.05)
"""
STUBBORN = """
import signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[1], "pids").write_text(str(inner.pid))
time.sleep(600)
"""


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(Gpu(str(i), f"GPU-{7 - i}a31", "NVIDIA H100") for i in range(4))
    monkeypatch.setattr(machine, "_all_gpus", lambda: gpus)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_one_process_is_plain_python(tmp_path: Path) -> None:
    """torchrun around a single process costs seconds and a layer of signals."""
    assert launch.shell_command(STAGES["tokenize"], tmp_path, Runtime()) == f"python -m gpt2.tokenize {tmp_path}"
    assert launch.shell_command(STAGES["train"], tmp_path, Runtime(gpus=0)) == f"python -m gpt2.train {tmp_path}"


def test_every_gpu_gets_a_process(tmp_path: Path, four_gpus: None) -> None:
    runtime = Runtime()
    assert launch.shell_command(STAGES["train"], tmp_path, runtime) == (
        f"python -m gpt2.torchrun --nproc-per-node=4 -m gpt2.train {tmp_path}"
    )
    assert launch.process_count(STAGES["tokenize"], runtime) == 1
    assert launch.process_count(STAGES["train"], Runtime(gpus=2)) == 2
    assert launch.process_count(STAGES["train"], Runtime(gpus=0, processes=3)) == 3


def test_nodes_meet_at_the_rendezvous(tmp_path: Path, four_gpus: None) -> None:
    """Without an id of its own two trainings on one head node would join each other."""
    directory = tmp_path / "train" / "0f3a"
    words = launch.command(STAGES["train"], directory, Runtime(nodes=2, rendezvous="head:29500"))
    assert {"--nnodes=2", "--rdzv-endpoint=head:29500", "--rdzv-id=train-0f3a", "--nproc-per-node=4"} <= set(words)
    with pytest.raises(UserError, match=r"nodes is 2 and runtime\.rendezvous is not given"):
        launch.command(STAGES["train"], directory, Runtime(nodes=2))


LISTENING = """
import os
import psutil
from gpt2.distributed import destroy_process_group, init_world

world = init_world("cpu")
world.barrier()
if world.is_main:
    for process in (psutil.Process(), psutil.Process(os.getppid())):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                print("listening on", connection.laddr.ip, flush=True)
world.barrier()
destroy_process_group()
"""


@pytest.mark.slow
def test_processes_of_one_machine_listen_on_loopback_alone(tmp_path: Path) -> None:
    """Bug: torchrun's store answers anybody in the network."""
    (tmp_path / "listen.py").write_text(LISTENING)
    words = [sys.executable, "-m", "gpt2.torchrun", "--nproc-per-node=2", str(tmp_path / "listen.py")]
    lines: list[str] = []
    launch.run(words, on_line=lines.append, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = {line.removeprefix("listening on ") for line in lines if line.startswith("listening on ")}
    assert found == {"127.0.0.1"}, lines


def test_more_gpus_than_there_are(four_gpus: None) -> None:
    with pytest.raises(UserError, match=r"runtime\.gpus is 8, this machine has 4: use runtime\.gpus=4"):
        launch.process_count(STAGES["train"], Runtime(gpus=8))


def test_cores_are_shared_among_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process takes all cores by default, and N of them then fight for them: several times slower."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "cpu_count", lambda: 8)
    assert launch.environment(STAGES["train"], Runtime(gpus=0, processes=3))["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in launch.environment(STAGES["tokenize"], Runtime())
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch.environment(STAGES["train"], Runtime(gpus=0, processes=3))["OMP_NUM_THREADS"] == "7"


def test_freed_memory_is_kept_where_the_processor_trains(tmp_path: Path, four_gpus: None) -> None:
    """Bug: the kernel maps the logits' memory again at each step, which doubles the step's time."""
    assert launch.environment(STAGES["train"], Runtime(gpus=0))["MALLOC_MMAP_MAX_"] == "0"
    assert "MALLOC_MMAP_MAX_" not in launch.environment(STAGES["train"], Runtime())
    assert "MALLOC_MMAP_MAX_" not in launch.environment(STAGES["tokenize"], Runtime(gpus=0))


def test_gpus_0_hides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the one process of `gpus: 0` would train on GPU 0, without anybody holding it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert launch.environment(STAGES["train"], Runtime(gpus=0))["CUDA_VISIBLE_DEVICES"] == ""
    assert launch.environment(STAGES["train"], Runtime())["CUDA_VISIBLE_DEVICES"] == "0,1"


# ----------------------------------------------------------------------------------------------------------- failure


def run_python(code: str, *arguments: str) -> list[str]:
    lines: list[str] = []
    launch.run([sys.executable, "-c", code, *arguments], on_line=lines.append, tick_seconds=0.05)
    return lines


def test_lines_of_both_streams_pass_in_order() -> None:
    code = "import sys\nfor i in range(3): print(i, flush=True); print('e', i, file=sys.stderr, flush=True)"
    assert run_python(code) == ["0", "e 0", "1", "e 1", "2", "e 2"]


@pytest.mark.parametrize(
    ("code", "crashed", "message"),
    [
        ("import sys; print('error: shard 7 is short', file=sys.stderr); sys.exit(2)", False, "shard 7 is short"),
        ("raise ValueError('3 is not 4')", True, "exit status 1: ValueError: 3 is not 4"),
        ("import os; os.kill(os.getpid(), 9)", True, "SIGKILL"),
        ("import sys; sys.exit(139)", True, "SIGSEGV"),
        ("import sys; sys.exit(143)", False, "SIGTERM"),
        ("import sys; sys.exit(255)", True, "exit status 255"),
    ],
)
def test_without_failure_json_status_and_last_line_give_the_reason(code: str, crashed: bool, message: str) -> None:
    """Only crashes are retried: neither an error for the user nor a process that was stopped on purpose."""
    with pytest.raises(launch.StageFailed) as caught:
        run_python(code)
    assert message in str(caught.value) and isinstance(caught.value, launch.StageCrashed) == crashed


@pytest.mark.parametrize(("kind", "crashed"), [("user", False), ("crash", True), ("interrupted", False)])
def test_failure_json_overrides_the_output(tmp_path: Path, kind: Any, crashed: bool) -> None:
    """Bug: the last printed line starts with "error: ", but another rank failed first."""
    write_failure(tmp_path, Failure(kind=kind, message="shard 7", rank=3))
    failed = launch.failure(1, ["error: rank 0"], tmp_path)
    assert (str(failed), isinstance(failed, launch.StageCrashed)) == ("shard 7", crashed)


def test_an_earlier_failure_json_is_not_the_reason(tmp_path: Path) -> None:
    write_failure(tmp_path, Failure(kind="user", message="an earlier start"))
    with pytest.raises(launch.StageCrashed, match="SIGKILL"):
        launch.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], directory=tmp_path)


RANK_0 = """
import os, signal, sys, time
from pathlib import Path
from gpt2.stage.failure import Failure, write_failure
def stop(number, frame):
    write_failure(Path(sys.argv[1]), Failure(kind="interrupted", message="saved"))
    os._exit(143)
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, stop)
    Path(sys.argv[1], "ready").touch()
    time.sleep(60)
while not Path(sys.argv[1], "ready").exists():
    time.sleep(0.05)
"""


def run_ranks(folder: Path, code: str) -> str:
    """Two ranks under torchrun, the second of which runs `code`; the crash."""
    (folder / "rank.py").write_text(code)
    words = [sys.executable, "-m", "gpt2.torchrun", "--nproc-per-node=2", str(folder / "rank.py"), str(folder)]
    with pytest.raises(launch.StageCrashed) as caught:
        launch.run(words, directory=folder, on_line=lambda line: None)
    return str(caught.value)


@pytest.mark.slow
def test_a_killed_rank_is_a_crash_although_rank_0_saves(tmp_path: Path) -> None:
    """Bug: torchrun stops rank 0 with SIGTERM, which records an interruption; the crash is then not retried."""
    assert "SIGKILL" in run_ranks(tmp_path, RANK_0 + "os.kill(os.getpid(), 9)")


@pytest.mark.slow
def test_torchrun_does_not_hide_a_failed_import(tmp_path: Path) -> None:
    """Its summary follows, and its status is 1 for any reason."""
    assert "No module named 'nowhere'" in run_ranks(tmp_path, "import nowhere")


# --------------------------------------------------------------------------------------- ends with its parent


def test_an_interruption_gives_the_child_time_to_save(tmp_path: Path) -> None:
    """Ctrl-C and Prefect's cancellation are exceptions in the main thread: training must write its checkpoint."""
    lines: list[str] = []

    def interrupt() -> None:
        if written(tmp_path / "pid"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch.run(
            [sys.executable, "-c", WAITER, str(tmp_path)], on_tick=interrupt, on_line=lines.append, tick_seconds=0.05
        )
    assert written(tmp_path / "saved") == "saved"
    assert lines == ["saved"]
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_child_that_does_not_end_is_killed_with_its_own(tmp_path: Path) -> None:
    def interrupt() -> None:
        if written(tmp_path / "pids"):
            raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        launch.run(
            [sys.executable, "-c", STUBBORN, str(tmp_path)], on_tick=interrupt, tick_seconds=0.05, grace_seconds=0.5
        )
    wait_for(lambda: gone(int((tmp_path / "pids").read_text())))


def test_kill_9_of_the_parent_ends_the_child_in_order(tmp_path: Path) -> None:
    """A training that nobody watches any more would hold its GPUs for days."""
    code = f"from tasks.launch import run; import sys; run([sys.executable, '-c', {WAITER!r}, {str(tmp_path)!r}])"
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: written(tmp_path / "pid"))
    parent.kill()
    parent.wait()
    wait_for(lambda: written(tmp_path / "saved"))
    wait_for(lambda: gone(int((tmp_path / "pid").read_text())))


@pytest.mark.slow
def test_kill_9_of_torchrun_ends_the_ranks_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun gives each rank a session of its own, so no signal to its group reaches them."""
    package = tmp_path / "waiting_stage.py"
    package.write_text(WAITER.replace("sys.argv[1])", "sys.argv[1]) / os.environ['RANK']\nhere.mkdir()"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    stage = STAGES["train"].model_copy(update={"module": "waiting_stage"})
    words = launch.command(stage, tmp_path, Runtime(gpus=0, processes=2))
    agent = subprocess.Popen(words)
    wait_for(lambda: all(written(tmp_path / rank / "pid") for rank in "01"))
    agent.kill()
    agent.wait()
    for rank in "01":
        wait_for(lambda rank=rank: written(tmp_path / rank / "saved"))  # type: ignore[misc]
        wait_for(lambda rank=rank: gone(int((tmp_path / rank / "pid").read_text())))  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------- GPU locks


@pytest.mark.usefixtures("four_gpus")
def test_gpus_are_held_until_the_child_ends() -> None:
    """A flow that is killed leaves its training a minute to save: the next one must not start on the same GPU."""
    waited: list[str] = []
    with lock_gpus(2, "train/0f3a", waited.append) as locks:
        words = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        child = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=locks)
    assert child.stdin is not None

    def end_the_child(text: str) -> None:
        waited.append(text)
        assert child.poll() is None
        child.stdin.close()

    with child, lock_gpus(1, "train/1b2c", end_the_child):
        child.stdin.close()  # where nobody waited
        child.wait(20)
    assert waited == [f"GPU 0 is locked by process {os.getpid()}: train/0f3a; waiting for it"]


@pytest.mark.usefixtures("four_gpus")
def test_disjoint_gpus_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with lock_gpus(2, "a", pytest.fail):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
        with lock_gpus(2, "b", pytest.fail):
            pass


@pytest.mark.usefixtures("four_gpus")
def test_the_lock_gpus_are_those_that_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: of "3,1" the one process uses GPU 3, while GPU 1 is held."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    with lock_gpus(1, "a", pytest.fail):
        assert [path.name for path in tmp_path.iterdir()] == ["gpt2-gpu-GPU-4a31.lock"]


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("name", ["1", "GPU-6a31", "GPU-6"])
def test_a_gpu_has_one_lock_whatever_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Bug: a training under the index and one under the UUID share the GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
    with lock_gpus(1, "a", pytest.fail):
        assert [path.name for path in tmp_path.iterdir()] == ["gpt2-gpu-GPU-6a31.lock"]


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.skipif(os.getuid() != 0, reason="becomes two users")
def test_two_users_share_the_locks_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the first user's umask leaves a file that the second user must not open."""

    def hold(uid: int) -> None:
        umask = os.umask(0o077)
        os.seteuid(uid)
        try:
            with lock_gpus(1, f"of user {uid}", pytest.fail):
                pass
        finally:
            os.seteuid(0)
            os.umask(umask)

    with tempfile.TemporaryDirectory(dir="/var/tmp") as shared:
        os.chmod(shared, 0o1777)
        monkeypatch.setattr(tempfile, "gettempdir", lambda: shared)
        hold(12_001)
        hold(12_002)
        (lock,) = Path(shared).iterdir()
        assert lock.stat().st_uid == 12_001 and "of user 12002" in lock.read_text()
        lock.chmod(0o644)  # made by hand
        hold(12_002)
        lock.chmod(0o600)
        with pytest.raises(UserError, match="readable for all users"):
            hold(12_002)
