"""The scripts for clusters, around programs that only note what they are called with."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SHELLCHECK = pathlib.Path(sys.executable).with_name("shellcheck")
FAKE = """#!/usr/bin/env bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n'; } >> "$CALLS"
[[ $* != *describe* ]] || echo ACTIVE
[[ $0 != *sbatch ]] || cat >> "$CALLS.script"
"""
ZONE = "--zone=us-west4-a"
TRAINING = ("--", "--config=a.py:b", "--workdir=gs://bucket/my run", "--config.data.source=it's")
CLUSTER = ("--cluster=c", ZONE)


class Programs:
    """`gcloud`, `xpk` and so on, first in PATH; and what they were called with."""

    def __init__(self, folder):
        self.calls_file = folder / "calls"
        (folder / "bin").mkdir()
        for name in ("gcloud", "xpk", "kubectl", "sbatch"):
            (folder / "bin" / name).write_text(FAKE)
            (folder / "bin" / name).chmod(0o755)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.env = os.environ | {"PATH": path, "CALLS": str(self.calls_file), "TMPDIR": str(folder)}

    def bash(self, *arguments, **kwargs):
        return subprocess.run(
            ["bash", *map(str, arguments)],
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            **kwargs,
        )

    def script(self, name, *arguments):
        return self.bash(ROOT / "launch" / name, *arguments)

    def calls(self):
        """The calls since the last time, each a list of words."""
        if not self.calls_file.exists():
            return []
        text = self.calls_file.read_text()
        self.calls_file.unlink()
        return [call.split("\0") for call in text.split("\0\n")[:-1]]


@pytest.fixture
def programs(tmp_path):
    return Programs(tmp_path)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tpu_pod.sh", ("create", "p", ZONE, "--accelerator_type=v5litepod-16", "--spot")),
        ("tpu_pod.sh", ("setup", "p", ZONE, "--project=my project")),
        ("tpu_pod.sh", ("start", "p", ZONE, *TRAINING)),
        ("tpu_pod.sh", ("logs", "p", ZONE)),
        ("tpu_pod.sh", ("status", "p", ZONE)),
        ("tpu_pod.sh", ("stop", "p", ZONE)),
        ("tpu_pod.sh", ("delete", "p", ZONE)),
        ("gke_xpk.sh", ("create-cluster", *CLUSTER, "--tpu_type=v5litepod-16")),
        ("gke_xpk.sh", ("start", *CLUSTER, "--workload=w", "--tpu_type=v5litepod-16", *TRAINING)),
        ("gke_xpk.sh", ("logs", *CLUSTER, "--workload=w")),
        ("gke_xpk.sh", ("status", *CLUSTER)),
        ("gke_xpk.sh", ("stop", *CLUSTER, "--workload=w")),
        ("gke_xpk.sh", ("delete-cluster", *CLUSTER)),
        ("slurm.sh", ("--name=my job", "--sbatch=--comment=a b", *TRAINING)),
    ],
)
def test_dry_run_prints_exactly_what_is_done(name, arguments, programs):
    done = programs.script(name, *arguments)
    assert done.returncode == 0, done.stderr
    calls = programs.calls()
    assert calls
    at = arguments.index("--") if "--" in arguments else len(arguments)
    dry = programs.script(name, *arguments[:at], "--dry-run", *arguments[at:])
    assert (dry.returncode, dry.stderr) == (0, "")
    assert programs.calls() == []
    programs.bash("-c", dry.stdout)  # printed as a shell would take it
    assert programs.calls() == calls


def only_call(programs, name, *arguments):
    assert programs.script(name, *arguments).returncode == 0
    (call,) = programs.calls()
    return call


def test_create_pods(programs):
    create = ["gcloud", "compute", "tpus", "queued-resources", "create", "my-pod"]
    base = ("create", "my-pod", ZONE, "--project=p")
    assert only_call(
        programs, "tpu_pod.sh", *base, "--accelerator_type=v5litepod-256", "--spot"
    ) == [
        *create,
        ZONE,
        "--project=p",
        "--accelerator-type=v5litepod-256",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=my-pod",
        "--spot",
    ]
    several = ("--accelerator_type=v6e-64", "--slices=4", "--reserved")
    assert only_call(programs, "tpu_pod.sh", *base, *several) == [
        *create,
        ZONE,
        "--project=p",
        "--accelerator-type=v6e-64",
        "--runtime-version=v2-alpha-tpuv6e",
        "--node-count=4",
        "--node-prefix=my-pod",
        "--reserved",
    ]


def test_setup_copies_this_commit_to_every_worker(programs):
    done = programs.script("tpu_pod.sh", "setup", "p", ZONE)
    assert done.returncode == 0, done.stderr
    describe, scp, ssh = programs.calls()
    queue = ["gcloud", "compute", "tpus", "queued-resources"]
    assert describe == [*queue, "describe", "p", ZONE, "--format=value(state.state)"]
    git = ["git", "-C", ROOT, "rev-parse", "--absolute-git-dir"]  # a folder that is not shared
    folder = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    archive = pathlib.Path(folder) / "blocktx-p.tar.gz"
    everywhere = [ZONE, "--node=all", "--worker=all"]
    assert scp == [*queue, "scp", str(archive), "p:blocktx.tar.gz", *everywhere]
    assert ssh[:-1] == [*queue, "ssh", "p", *everywhere]
    assert ".[tpu,gcs]" in ssh[-1]
    names = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True, check=True)
    assert "launch/train.py" in names.stdout.splitlines()


@pytest.fixture
def worker(tmp_path):
    """The home of a worker whose runs only note their arguments, and save when they are stopped."""
    home = tmp_path / "home"
    (home / "blocktx" / "launch").mkdir(parents=True)
    restart = home / "blocktx" / "launch" / "restart.sh"
    restart.write_text(
        "#!/usr/bin/env bash\ntrap 'echo saved; exit 143' TERM\nprintf '<%s>\\n' \"$@\"\n"
        "while :; do sleep 0.05; done\n"
    )
    restart.chmod(0o755)
    yield home
    pid = home / "blocktx" / "run.pid"
    if pid.exists() and pathlib.Path("/proc", pid.read_text().strip()).exists():
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_run_on_a_worker(programs, worker):
    """The commands that workers are sent, carried out."""

    def remotely(command, *arguments):
        assert programs.script("tpu_pod.sh", command, "p", ZONE, *arguments).returncode == 0
        sent = programs.calls()[-1][-1]
        assert sent.startswith("--command=")
        programs.env["HOME"] = str(worker)
        return programs.bash("-c", sent.removeprefix("--command="), cwd=worker)

    begin = time.monotonic()
    assert remotely("start", *TRAINING).returncode == 0
    assert time.monotonic() - begin < 5  # it does not wait for the run
    log = worker / "blocktx" / "run.log"
    while "--resume" not in log.read_text():
        time.sleep(0.01)
    assert log.read_text().splitlines() == [
        "<.venv/bin/python>",
        "<launch/train.py>",
        "<--config=a.py:b>",
        "<--workdir=gs://bucket/my run>",
        "<--config.data.source=it's>",
        "<--resume>",
    ]
    again = remotely("start", *TRAINING)
    assert (again.returncode, again.stdout) == (1, "a run is going on; stop it\n")
    assert remotely("status").stdout == "<--resume>\nrunning\n"
    assert remotely("stop").stdout.endswith("saved\n")
    assert remotely("status").stdout == "saved\nnot running\n"


def test_workload_in_gke(programs):
    """Of the command, xpk passes SIGTERM on to the shell only: the loop has to take its place."""
    start = ("start", *CLUSTER, "--workload=w", "--tpu_type=v5litepod-256", "--slices=2")
    call = only_call(programs, "gke_xpk.sh", *start, "--docker_image=gcr.io/p/i:1", *TRAINING)
    assert call == [
        *["xpk", "workload", "create", "--cluster=c"],
        ZONE,
        "--workload=w",
        "--tpu-type=v5litepod-256",
        "--num-slices=2",
        "--max-restarts=50",
        "--termination-grace-period-seconds=120",
        "--docker-image=gcr.io/p/i:1",
        "--command=exec launch/restart.sh python launch/train.py --config=a.py:b "
        r"--workdir=gs://bucket/my\ run --config.data.source=it\'s --resume",
    ]
    *_, base, folder, command = only_call(programs, "gke_xpk.sh", *start, *TRAINING)
    assert (base, folder) == ("--base-docker-image=python:3.12", f"--script-dir={ROOT}")
    assert command.startswith(
        "--command=pip install --quiet -e '.[tpu,gcs]' && exec launch/restart"
    )


JOB = """#!/usr/bin/env bash
echo "$@" >> "$(dirname "$0")/../calls.srun"
exit "$CODE"
"""


def slurm_job(programs, tmp_path, code, restarts=0):
    """The job's script, carried out where `srun` ends with `code`; its code and the calls."""
    done = programs.script("slurm.sh", "--max_restarts=3", *TRAINING)
    assert done.returncode == 0, done.stderr
    (call,) = programs.calls()
    (tmp_path / "bin" / "srun").write_text(JOB)
    shutil.copy(tmp_path / "bin" / "gcloud", tmp_path / "bin" / "scontrol")
    (tmp_path / "bin" / "srun").chmod(0o755)
    programs.env |= {"CODE": str(code), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    script = tmp_path / "calls.script"
    job = programs.bash(script)
    script.unlink()
    return call, job, programs.calls()


def test_slurm_starts_a_process_for_each_gpu(programs, tmp_path):
    call, job, calls = slurm_job(programs, tmp_path, 0)
    assert call[0] == "sbatch"
    for flag in ("--nodes=1", "--gpus-per-node=8", "--ntasks-per-node=8", "--signal=TERM@120"):
        assert flag in call
    assert f"--output={ROOT}/blocktx-%j.log" in call
    local = ("--", "--config=a.py", f"--workdir={tmp_path}/run")
    assert f"--output={tmp_path}/run/blocktx-%j.log" in only_call(programs, "slurm.sh", *local)
    assert (tmp_path / "run").is_dir()  # in which training begins a run, and resumes it
    assert not any(flag.startswith("--gpus-per-task") for flag in call)
    assert (job.returncode, calls) == (0, [])
    assert (tmp_path / "calls.srun").read_text() == (
        f"--kill-on-bad-exit=1 --cpus-per-task=8 {ROOT}/.venv/bin/python launch/train.py "
        "--config=a.py:b --workdir=gs://bucket/my run --config.data.source=it's --resume\n"
    )


@pytest.mark.parametrize("code", [143, 134, 137])
def test_slurm_job_goes_back_into_the_queue(code, programs, tmp_path):
    _, _, calls = slurm_job(programs, tmp_path, code, restarts=2)
    assert calls == [["scontrol", "requeue", "7"]]
    _, job, calls = slurm_job(programs, tmp_path, code, restarts=3)
    assert (job.returncode, calls) == (code, [])


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_slurm_job_that_ends(code, programs, tmp_path):
    _, job, calls = slurm_job(programs, tmp_path, code)
    assert (job.returncode, calls) == (code, [])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tpu_pod.sh", (), "no command"),
        ("tpu_pod.sh", ("make", "p", ZONE), "unknown command 'make'"),
        ("tpu_pod.sh", ("create", ZONE), "create: the name of the pod is missing"),
        ("tpu_pod.sh", ("create", "My Pod", ZONE), "name: got 'My Pod'"),
        ("tpu_pod.sh", ("create", "p"), "--zone is missing"),
        ("tpu_pod.sh", ("create", "p", "--zone="), "--zone: is empty"),
        ("tpu_pod.sh", ("create", "p", ZONE), "create: --accelerator_type is missing"),
        (
            "tpu_pod.sh",
            ("create", "p", ZONE, "--accelerator_type=v99-8"),
            "'v99-8' is unknown here",
        ),
        ("tpu_pod.sh", ("create", "p", ZONE, "--slices=two"), "--slices: got 'two'"),
        (
            "tpu_pod.sh",
            ("create", "p", ZONE, "--accelerator_type=v6e-8", "--spot", "--reserved"),
            "--spot and --reserved exclude each other",
        ),
        ("tpu_pod.sh", ("stop", "p", ZONE, "--", "--config=a"), "stop takes no flags"),
        ("tpu_pod.sh", ("start", "p", ZONE, "--config=a"), "unknown option '--config=a'; flags of"),
        ("tpu_pod.sh", ("start", "p", ZONE, "--", "--workdir=gs://b/r"), "--config=... is missing"),
        (
            "tpu_pod.sh",
            ("start", "p", ZONE, "--", "--config=a", "--workdir=runs/a"),
            "--workdir=runs/a: every worker would have a folder of its own",
        ),
        ("gke_xpk.sh", ("start", ZONE), "--cluster is missing"),
        ("gke_xpk.sh", ("start", *CLUSTER), "start: --workload is missing"),
        ("gke_xpk.sh", ("stop", *CLUSTER), "stop: --workload is missing"),
        ("gke_xpk.sh", ("create-cluster", *CLUSTER), "create-cluster: --tpu_type is missing"),
        ("slurm.sh", ("--", "--config=a"), "--workdir=... is missing after --"),
        ("slurm.sh", ("--nodes=0", *TRAINING), "--nodes: got '0'"),
        ("slurm.sh", ("--gpus=8", *TRAINING), "unknown option '--gpus=8'"),
    ],
)
def test_mistakes(name, arguments, message, programs):
    done = programs.script(name, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}: error: ")
    assert message in done.stderr
    assert programs.calls() == []


@pytest.mark.parametrize("name", ["tpu_pod.sh", "gke_xpk.sh", "slurm.sh", "restart.sh"])
def test_help(name, programs):
    done = programs.script(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: launch/{name} ")


def test_shellcheck_finds_nothing():
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    assert len(scripts) == 4
    done = subprocess.run(
        [SHELLCHECK, *scripts, ROOT / ".ci" / "run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_an_image_of_the_clone_leaves_out_what_git_ignores():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {*ignored, ".git/"} <= set((ROOT / ".dockerignore").read_text().split())
