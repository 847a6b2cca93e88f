"""Parsl, unmodified, drives jobrunner through PBSProProvider and TorqueProvider, alone and under its own executor."""

import operator
import os
import sysconfig
import textwrap

import pytest

parsl = pytest.importorskip("parsl", reason="parsl is not installed")

from harness import read, until  # noqa: E402
from parsl.config import Config  # noqa: E402
from parsl.executors import HighThroughputExecutor  # noqa: E402
from parsl.jobs.states import JobState  # noqa: E402
from parsl.launchers import SimpleLauncher, SingleNodeLauncher  # noqa: E402
from parsl.providers import PBSProProvider, TorqueProvider  # noqa: E402
from parsl.providers.errors import SubmitException  # noqa: E402

PROVIDERS = {"PBSPro": PBSProProvider, "Torque": TorqueProvider}


@pytest.fixture(params=PROVIDERS)
def make_provider(request, tmp_path):
    """A provider whose scripts and outputs are in the test's folder."""

    def make(launcher=None, **options):
        provider = PROVIDERS[request.param](launcher=launcher or SimpleLauncher(), walltime="00:05:00", **options)
        provider.script_dir = str(tmp_path / "scripts")
        os.makedirs(provider.script_dir)
        return provider

    return make


@pytest.fixture
def provider(cluster, make_provider):
    return make_provider()


def state(provider, name):
    """What the provider says of a job now."""
    (status,) = provider.status([name])
    return status.state


def completed(provider, *names):
    """Waits until the provider says so of all of them."""
    until(
        lambda: {status.state for status in provider.status(names)} == {JobState.COMPLETED}, f"{names} to be completed"
    )


def outputs(provider):
    """What the jobs of a provider printed to stdout, and to stderr."""
    files = sorted(os.path.join(provider.script_dir, name) for name in os.listdir(provider.script_dir))
    return [sorted(read(path) for path in files if path.endswith(end)) for end in (".stdout", ".stderr")]


def test_a_job_that_succeeds_is_completed_and_its_output_is_in_its_files(provider, cluster):
    name = provider.submit("echo out of $JOBNAME; echo careful >&2", 1, "block.0")
    completed(provider, name)
    listed = cluster.listed(name)
    assert (listed["job_state"], listed["Exit_status"]) == ("F", 0)
    until(lambda: outputs(provider) == [[f"out of {listed['Job_Name']}\n"], ["careful\n"]], "both files")
    assert "block.0" in listed["Job_Name"]


def test_a_job_that_fails_is_over_and_its_exit_code_is_told(provider, cluster):
    name = provider.submit("exit 3", 1)
    completed(provider, name)  # these two providers of Parsl do not ask how a job ended
    assert cluster.listed(name)["Exit_status"] == 3


def test_a_running_job_is_cancelled(provider, cluster):
    name = provider.submit("sleep 300", 1)
    until(lambda: state(provider, name) is JobState.RUNNING, "the job to run")
    assert provider.cancel([name]) == [True]
    assert cluster.over(name)["Exit_status"] == 271
    completed(provider, name)


def test_a_job_cancelled_before_it_runs_never_runs(empty_cluster, make_provider, tmp_path):
    provider = make_provider()
    name = provider.submit(f"touch {tmp_path}/ran", 1)
    assert state(provider, name) is JobState.PENDING
    assert provider.cancel([name]) == [True]
    empty_cluster.start_client()
    completed(provider, name, provider.submit("true", 1))
    assert not os.path.exists(tmp_path / "ran")


def test_of_several_cancelled_together_one_may_be_over_already(provider, cluster):
    over, running = provider.submit("true", 1), provider.submit("sleep 300", 1)
    cluster.over(over)
    cluster.until_running(running)
    assert provider.cancel([over, running]) == [True, True]
    assert cluster.over(running)["Exit_status"] == 271


def test_many_jobs_are_told_apart(empty_cluster, make_provider):
    provider = make_provider()
    names = [provider.submit("true", 1) for _ in range(11)]  # so that one id begins another: 1, 10, 11
    assert len(set(names)) == 11
    assert [status.state for status in provider.status(names)] == [JobState.PENDING] * 11
    empty_cluster.start_client()
    completed(provider, *names)


def test_a_job_forgotten_meanwhile_does_not_hide_the_others(provider, cluster):
    running = provider.submit("sleep 300", 1)
    provider.resources["4711"] = {**provider.resources[running], "job_id": "4711"}
    cluster.until_running(running)
    code, out, err = cluster.run("qstat", running, "4711")
    assert code == 153 and "4711" in err and "4711" not in out
    assert [line.split()[:1] + line.split()[4:5] for line in out.splitlines()[2:]] == [[running, "R"]]


def test_options_of_the_provider_reach_the_job(cluster, make_provider):
    cluster.server.queue("night")
    options = "#PBS -l mem=256mb\n#PBS -p 5"
    provider = make_provider(
        queue="night", account="proj1", scheduler_options=options, worker_init="export COLOUR=blue"
    )
    name = provider.submit('echo "$COLOUR $(wc -l < "$PBS_NODEFILE")"', 1)
    completed(provider, name)
    listed = cluster.listed(name)
    assert (listed["queue"], listed["Account_Name"], listed["Priority"]) == ("night", "proj1", 5)
    assert {"mem": "262144kb", "walltime": "00:05:00", "ncpus": 1}.items() <= listed["Resource_List"].items()
    until(lambda: outputs(provider)[0] == ["blue 1\n"], "the output")


def test_more_than_one_node_is_refused_with_the_reason(cluster, make_provider, caplog):
    provider = make_provider(nodes_per_block=2)
    try:
        assert provider.submit("true", 1) is None  # Torque's logs why
        said = caplog.text
    except SubmitException as error:  # PBSPro's raises it
        said = error.stderr
    assert "node" in said and "Traceback" not in said


def test_a_workflow_runs_in_a_block_and_the_block_is_deleted_at_its_end(cluster, make_provider, tmp_path, monkeypatch):
    scripts = sysconfig.get_path("scripts")  # Parsl looks for its own programs on the PATH, here and in the job
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}{scripts}")
    provider = make_provider(launcher=SingleNodeLauncher(), worker_init=f"export PATH={scripts}:$PATH")
    executor = HighThroughputExecutor(
        label="here", provider=provider, address="127.0.0.1", max_workers_per_node=2, encrypted=False
    )
    config = Config(executors=[executor], run_dir=str(tmp_path / "runs"), strategy="none")
    with parsl.load(config) as kernel:
        # Functions of the standard library: the workers find them without finding this file.
        squares = [parsl.python_app(operator.mul, data_flow_kernel=kernel)(n, n) for n in range(10)]
        failing = parsl.bash_app(textwrap.dedent, data_flow_kernel=kernel)("exit 3")
        assert [future.result(timeout=60) for future in squares] == [n * n for n in range(10)]
        with pytest.raises(parsl.app.errors.BashExitFailure) as failure:
            failing.result(timeout=60)
        assert failure.value.exitcode == 3
        (block,) = executor.blocks_to_job_id.values()
        assert cluster.listed(block)["job_state"] == "R"
    assert cluster.over(block)["Exit_status"] in (265, 271)
