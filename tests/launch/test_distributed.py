"""Who the processes are, and two of them that train as SLURM's tasks would, over loopback and in two namespaces."""

import argparse
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import yaml

from infimed_jax.config import to_dict
from infimed_jax.errors import UserError
from infimed_jax.runs.metrics import read_metrics
from launch import run
from launch.machine import distributed

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "launch/tpu").glob("*.sh")), *sorted((ROOT / "launch/slurm").glob("*.sbatch"))]
SLURM = {"SLURM_JOB_ID": "5", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"}


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    distributed.add_options(parser)
    return parser.parse_args(arguments)


def test_a_process_alone_is_alone():
    assert distributed.detect(options(), {}) is None
    assert distributed.detect(options(), SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


def test_by_hand():
    arguments = ("--coordinator", "node1:1234", "--process-id", "1", "--num-processes", "3")
    found = distributed.detect(options(*arguments), SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"})
    assert (found.coordinator, found.number, found.count, found.devices) == ("node1:1234", 1, 3, None)
    assert "1 of 3 by command line, coordinator node1:1234" in str(found)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--coordinator", "h:1"), "--process-id"),
        (("--num-processes", "2"), "--coordinator"),
        (("--coordinator", "h", "--process-id", "0", "--num-processes", "2"), "HOST:PORT"),
        (("--coordinator", "h:1", "--process-id", "2", "--num-processes", "2"), r"\[0, 1\]"),
        (("--coordinator", "h:1", "--process-id", "0", "--num-processes", "-1"), "-1 must be at least 1"),
        (("--coordinator", "h:1", "--process-id", "0", "--num-processes", "0"), "--num-processes 0 must"),
    ],
)
def test_options_that_do_not_belong_together(arguments, word):
    with pytest.raises(UserError, match=word):
        distributed.detect(options(*arguments), {})


def test_slurm_tasks_share_a_coordinator_and_own_their_node():
    tasks = [SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": str(i)} for i in range(2)]
    first, second = (distributed.detect(options(), task) for task in tasks)
    assert first.coordinator == second.coordinator and first.coordinator.startswith("gpu07:")
    assert (first.number, second.number, first.count) == (0, 1, 2)
    assert first.devices is None, "one task a node owns all of the node's GPUs"
    other_job = distributed.detect(options(), tasks[0] | {"SLURM_JOB_ID": "6"})
    assert other_job.coordinator != first.coordinator


def test_slurm_tasks_that_share_a_node_take_a_gpu_each():
    task = SLURM | {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    assert distributed.detect(options(), task).devices == (1,)


def test_an_allocation_without_srun_is_no_group_of_processes():
    inside = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    with pytest.raises(UserError, match="srun"):
        distributed.detect(options(), inside)
    assert distributed.detect(options("--num-processes", "1"), inside) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,host2", "node1"),
        ("node[001-015],host2", "node001"),
        ("gpu[07,09-12]", "gpu07"),
        ("rack[1-2]-eth0", "rack1-eth0"),
    ],
)
def test_the_first_host_of_slurm_s_list(nodes, host):
    assert distributed.first_host(nodes) == host


def test_a_tpu_slice_is_left_to_jax(monkeypatch):
    monkeypatch.setattr(distributed, "tpu_chips", lambda: 4)
    assert distributed.detect(options(), {}).found_by == "TPU slice"
    assert distributed.detect(options(), {"TPU_WORKER_HOSTNAMES": "a,b"}).found_by == "GKE TPU slice"
    assert distributed.detect(options(), {"JAX_PLATFORMS": "cpu"}) is None


def _job_with_a_free_port() -> str:
    for job in range(os.getpid(), os.getpid() + 100):
        task = SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": str(job)}
        port = int(distributed.detect(options(), task).coordinator.rpartition(":")[2])
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):  # nobody answers
                return str(job)
    pytest.fail("no free port in a hundred")


def _train(commands: list[list[str]], environments: list[dict[str, str]]) -> list[str]:
    """Standard output of each, which all must end well."""
    children = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [child.communicate(timeout=560)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * len(children), outputs[0][-2000:] + outputs[-1][-2000:]
    return outputs


def _command(tmp_path: Path, cfg, *before: str) -> list[str]:
    settings = tmp_path / "stage.yaml"
    settings.write_text(yaml.safe_dump(to_dict(cfg)), encoding="utf-8")
    return [sys.executable, "launch/run.py", *before, "train", "--config", str(settings)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of every process: a CPU device each, no job of SLURM's, and compiled programs kept for all of them."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    cache = str(tmp_path_factory.mktemp("cache"))
    return plain | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XDG_CACHE_HOME": cache}


@pytest.mark.timeout(600)
def test_two_slurm_tasks_train_together(stage, environment, tmp_path):
    cfg = stage(steps=2, checkpoint_every=50, output=str(tmp_path / "run"))
    job = {"SLURM_JOB_ID": _job_with_a_free_port(), "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0"}
    tasks = [environment | job | {"SLURM_PROCID": str(i)} for i in range(2)]
    outputs = _train([_command(tmp_path, cfg)] * 2, tasks)
    for number, output in enumerate(outputs):
        assert f"processes: {number} of 2 by SLURM, coordinator localhost:" in output
        assert "2 cpu devices" in output
    assert [row["step"] for row in read_metrics(cfg.train.output)] == [1, 2]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", [0, 1], ids=["the coordinator", "another"])
def test_a_process_whose_other_one_is_killed_ends_in_one_line_to_be_resumed(stage, environment, tmp_path, killed):
    cfg = stage(steps=100_000, checkpoint_every=100_000, log_every=1000, output=str(tmp_path / "run"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    by_hand = ("--coordinator", address, "--num-processes", "2", "--process-id")
    children = [
        subprocess.Popen(
            _command(tmp_path, cfg, *by_hand, str(number)),
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        while len(read_metrics(cfg.train.output)) < 5:
            assert [child.poll() for child in children] == [None, None], children[0].communicate()
            time.sleep(0.1)
        children[killed].kill()
        _, error = children[1 - killed].communicate(timeout=200)
    finally:
        for child in children:
            child.kill()
    assert children[1 - killed].returncode == run.EXIT_RESUME_ME, error
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith(f"process {1 - killed} of 2 lost another one, whose log says why (")
    assert last.endswith("the same command continues from the latest checkpoint")


_OUT_OF_MEMORY = """
import sys
from launch import run

def fourth_step_has_no_room():
    import jax
    from infimed_jax.train import stage
    real, steps = stage.make_train_step, []

    def make(*arguments):
        step = real(*arguments)

        def run_or_fail(*state):
            steps.append(1)
            if len(steps) == 4:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")
            return step(*state)

        return run_or_fail

    stage.make_train_step = make

start = run.accelerator.start
run.accelerator.start = lambda args: (start(args), fourth_step_has_no_room())
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.mark.timeout(300)
def test_a_process_out_of_memory_ends_the_others_as_a_lost_one_does(stage, environment, tmp_path):
    """It says what needs less, and is gone: until JAX's own end the other would wait for five minutes."""
    cfg = stage(steps=100_000, checkpoint_every=100_000, log_every=1000, output=str(tmp_path / "run"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [
        _command(tmp_path, cfg, "--coordinator", address, "--num-processes", "2", "--process-id", str(number))
        for number in range(2)
    ]
    commands[1][1:2] = ["-c", _OUT_OF_MEMORY]
    children = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        errors = [child.communicate(timeout=200)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [run.EXIT_RESUME_ME, run.EXIT_USER_ERROR], errors
    assert errors[1].strip().startswith("error: out of memory on a device (RESOURCE_EXHAUSTED")
    assert errors[0].splitlines()[-1].startswith("process 0 of 2 lost another one, whose log says why (")
    assert len(read_metrics(cfg.train.output)) in (2, 3), "of three steps; the third's result may not have been read"


def test_an_error_of_its_own_is_not_blamed_on_another_process(monkeypatch):
    """Alone nothing can be lost; among others a device out of memory, or a program's fault, stays what it is."""
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    assert distributed.lost_another(lost) is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "lost another one" in distributed.lost_another(lost)
    assert distributed.lost_another(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")) is None
    assert distributed.lost_another(ConnectionResetError("Connection reset by peer")) is None


def _namespaces_work() -> bool:
    if os.geteuid() != 0 or not shutil.which("ip"):
        return False
    made = subprocess.run(["ip", "netns", "add", "infimed-probe"], capture_output=True)
    subprocess.run(["ip", "netns", "del", "infimed-probe"], capture_output=True)
    return made.returncode == 0


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable: 10.99.0.1 and 10.99.0.2 reach each other, and nothing else."""
    if not _namespaces_work():
        pytest.skip("needs root and network namespaces (ip netns)")
    names = [f"infimed{os.getpid()}-{i}" for i in range(2)]
    # `ip netns exec` lays these over /etc: each host's own name is its own address, as gloo expects.
    own = [Path("/etc/netns") / name for name in names]
    ends = [f"inf{os.getpid() % 10_000}-{i}" for i in range(2)]
    steps = [["netns", "add", name] for name in names]
    steps.append(["link", "add", ends[0], "type", "veth", "peer", "name", ends[1]])
    for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
        inside = ["netns", "exec", name, "ip"]
        steps += [
            ["link", "set", end, "netns", name],
            [*inside, "addr", "add", f"10.99.0.{number}/24", "dev", end],
            [*inside, "link", "set", end, "up"],
            [*inside, "link", "set", "lo", "up"],
        ]
    try:
        for number, folder in enumerate(own, start=1):
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n10.99.0.{number} {socket.gethostname()}\n")
        for step in steps:
            done = subprocess.run(["ip", *step], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"this machine joins no namespaces: ip {' '.join(step)}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        for folder in own:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(600)
def test_two_hosts_train_by_hand(two_hosts, stage, environment, tmp_path):
    cfg = stage(steps=2, checkpoint_every=50, output=str(tmp_path / "run"))
    by_hand = ("--coordinator", "10.99.0.1:5123", "--num-processes", "2", "--process-id")
    commands = [
        ["ip", "netns", "exec", host, *_command(tmp_path, cfg, *by_hand, str(number))]
        for number, host in enumerate(two_hosts)
    ]
    outputs = _train(commands, [environment] * 2)
    assert all(f"processes: {i} of 2 by command line" in output for i, output in enumerate(outputs))
    assert [row["step"] for row in read_metrics(cfg.train.output)] == [1, 2]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("own", ["new", "old"])
def test_a_tpu_worker_gets_a_python_that_is_new_enough(tmp_path, own):
    """What create.sh sends to the workers is run here, with commands that only say that they were called."""
    makes_venv = 'basename "$0" >> called; mkdir -p .venv/bin; cp {say} .venv/bin/pip; cp {say} .venv/bin/python'
    for name, text in {
        "say": 'echo "$(basename "$0") $*" >> called',
        "git": "",
        "tar": "",
        "sudo": 'echo "sudo $*" >> called',
        "gcloud": 'for a in "$@"; do case $a in --command=*) echo "${a#--command=}" > {command};; esac; done',
        "python3": f'[ "$1" = -c ] && exit {int(own == "old")}; {makes_venv}',
        "python3.11": makes_venv,
    }.items():
        for place in ("say", "command"):
            text = text.replace(f"{{{place}}}", str(tmp_path / place))
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NAME": "n", "ZONE": "z", "TYPE": "v5p-64"}
    for command in (ROOT / "launch/tpu/create.sh", tmp_path / "command"):
        subprocess.run(["bash", str(command)], env=environment, cwd=tmp_path, check=True)
    called = (tmp_path / "infimed-jax/called").read_text().splitlines()
    assert called[-3:-2] == [{"new": "python3", "old": "python3.11"}[own]]
    assert any("install -y -qq python3.11-venv" in line for line in called) == (own == "old")
    assert called[-1] == "python launch/run.py doctor --platform tpu"


@pytest.mark.parametrize(("restarts", "requeued"), [(None, True), (19, True), (20, False)])
def test_the_sbatch_file_gives_srun_the_settings(tmp_path, restarts, requeued):
    """Run with a srun that prints: YAML files become --config, code 75 goes back to the queue, but not for ever."""
    for name, text in {
        "srun": 'printf "%s\\n" "$@"; exit 75',
        "scontrol": 'echo "scontrol $*"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "USER": "u",
    }  # fmt: skip
    environment |= {} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}
    script = ROOT / "launch/slurm/train.sbatch"
    done = subprocess.run(
        ["bash", str(script), "a.yaml", "b c.yaml", "train.steps=2"], env=environment, capture_output=True, text=True
    )
    last = ["scontrol requeue 7"] if requeued else []
    expected = ["--config", "a.yaml", "--config", "b c.yaml", "train.steps=2", *last]
    assert done.stdout.splitlines()[-len(expected) :] == expected
    assert done.returncode == 75 and ("submit the same line again" in done.stderr) == (not requeued)


def test_the_jobset_names_what_a_slice_has():
    jobset = yaml.safe_load((ROOT / "launch/gke/jobset.yaml").read_text(encoding="utf-8"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    container = pod["containers"][0]
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy asks for it"
    command = container["command"]
    files = [after for before, after in itertools.pairwise(command) if before == "--config"]
    assert files and all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize(
    ("code", "conditions", "action"),
    [
        (run.EXIT_USER_ERROR, {}, "FailJobSet"),
        (1, {}, "FailJobSet"),  # a traceback
        (run.EXIT_RESUME_ME, {}, "RestartJobSet"),
        (128 + signal.SIGABRT, {}, "RestartJobSet"),  # JAX, of a lost host
        (128 + signal.SIGKILL, {}, "RestartJobSet"),
        (128 + signal.SIGTERM, {}, "RestartJobSet"),
        (1, {"DisruptionTarget": "True"}, "RestartJobSet"),  # preempted: its code says nothing
        (1, {"DisruptionTarget": "False"}, "FailJobSet"),
    ],
)
def test_the_jobset_restarts_what_a_restart_can_mend(code, conditions, action):
    """By the rules of the Job and JobSet controllers: the first that matches is taken, and each has its default."""
    spec = yaml.safe_load((ROOT / "launch/gke/jobset.yaml").read_text(encoding="utf-8"))["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]

    def matches(rule: dict) -> bool:
        if "onPodConditions" in rule:
            return any(conditions.get(wanted["type"]) == wanted["status"] for wanted in rule["onPodConditions"])
        wanted = rule["onExitCodes"]
        assert wanted["containerName"] == container["name"] and wanted["operator"] == "In" and 0 not in wanted["values"]
        return code in wanted["values"]

    taken = next((rule["action"] for rule in job["podFailurePolicy"]["rules"] if matches(rule)), "Count")
    assert taken in ("FailJob", "Count") and job["backoffLimit"] == 0, "Count is one too many"
    reason = {"FailJob": "PodFailurePolicy", "Count": "BackoffLimitExceeded"}[taken]
    rules = spec["failurePolicy"]["rules"]
    assert next((rule["action"] for rule in rules if reason in rule["onJobFailureReasons"]), "RestartJobSet") == action
