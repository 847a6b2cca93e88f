"""PSI/J, unmodified, drives jobrunner through its executors `pbs` and `pbs_classic`."""

import datetime
import getpass
import os

import pytest

psij = pytest.importorskip("psij", reason="psij-python is not installed")

from harness import PATIENCE, read, until  # noqa: E402
from psij.executors.batch.pbs_base import PBSExecutorConfig  # noqa: E402

FLAVOURS = ("pbs", "pbs_classic")


# The two differ in their script's resources only; what has nothing to do with these is tried with one of them.
one_flavour = pytest.mark.parametrize("flavour", ["pbs"], indirect=True)


@pytest.fixture(params=FLAVOURS)
def flavour(request):
    return request.param


@pytest.fixture
def make_executor(tmp_path, flavour):
    """An executor that asks often, and whose files are the test's."""

    def make():
        config = PBSExecutorConfig(
            work_directory=tmp_path / "psij", queue_polling_interval=0.3, initial_queue_polling_delay=0
        )
        return psij.JobExecutor.get_instance(flavour, config=config)

    return make


@pytest.fixture
def executor(cluster, make_executor):
    return make_executor()


def job(script, *arguments, **spec):
    """A PSI/J job that is a piece of sh."""
    return psij.Job(psij.JobSpec(executable="/bin/sh", arguments=["-c", script, "sh", *arguments], **spec))


def ended(job):
    """The final status of a job."""
    status = job.wait(timeout=datetime.timedelta(seconds=PATIENCE))
    assert status is not None, f"waited {PATIENCE} s; the job is {job.status}"
    return status


def test_a_job_that_succeeds_is_completed_and_its_output_is_in_its_file(executor, tmp_path):
    seen = []
    one = job('printf "%s|" "$@"; echo "$COLOUR in $PWD"; echo careful >&2', "two words", "it's", "$HOME;",
              stdout_path=tmp_path / "out", stderr_path=tmp_path / "err", directory=tmp_path,
              environment={"COLOUR": "dark blue"})  # fmt: skip
    one.set_job_status_callback(lambda _, status: seen.append(status.state))
    executor.submit(one)
    status = ended(one)
    assert (status.state, status.exit_code) == (psij.JobState.COMPLETED, 0)
    assert read(tmp_path / "out") == f"two words|it's|$HOME;|dark blue in {tmp_path}\n"
    assert read(tmp_path / "err") == "careful\n"
    assert seen[0] is psij.JobState.QUEUED and seen[-1] is psij.JobState.COMPLETED


def test_a_job_that_fails_is_failed_with_its_exit_code(executor):
    one = job("exit 3")
    executor.submit(one)
    status = ended(one)
    assert (status.state, status.exit_code) == (psij.JobState.FAILED, 3)


@one_flavour
def test_many_jobs_are_told_apart(executor, tmp_path):
    jobs = [job(f"echo {n}; exit {n}", stdout_path=tmp_path / f"out{n}") for n in range(6)]
    for one in jobs:
        executor.submit(one)
    assert [ended(one).exit_code for one in jobs] == list(range(6))
    assert [read(tmp_path / f"out{n}") for n in range(6)] == [f"{n}\n" for n in range(6)]


def test_a_running_job_that_will_not_end_is_canceled(executor, cluster, tmp_path):
    one = job("trap '' TERM; echo up; while :; do sleep 0.1; done", stdout_path=tmp_path / "out")
    executor.submit(one)
    until(lambda: read(tmp_path / "out"), "the job to be up")
    one.cancel()
    assert ended(one).state is psij.JobState.CANCELED
    assert cluster.listed(one.native_id)["Exit_status"] == 265


def test_a_running_job_that_ends_when_asked_is_over_and_says_that_it_was_deleted(executor, cluster, tmp_path):
    one = job("echo up; sleep 300", stdout_path=tmp_path / "out")
    executor.submit(one)
    until(lambda: read(tmp_path / "out"), "the job to be up")
    one.cancel()
    status = ended(one)
    assert cluster.listed(one.native_id)["Exit_status"] == 271
    assert status.state is psij.JobState.FAILED  # PSI/J knows only 265 for canceled, on PBS as here
    assert "deleted" in status.message


@one_flavour
def test_where_the_client_kills_at_once_a_canceled_job_is_canceled(empty_cluster, make_executor, tmp_path):
    empty_cluster.start_client("--kill-delay", "0")
    one = job("echo up; sleep 300", stdout_path=tmp_path / "out")
    make_executor().submit(one)
    until(lambda: read(tmp_path / "out"), "the job to be up")
    one.cancel()
    assert ended(one).state is psij.JobState.CANCELED


def test_a_job_canceled_before_it_runs_is_canceled_and_never_runs(empty_cluster, make_executor, tmp_path):
    one, executor = job("echo ran", stdout_path=tmp_path / "out"), make_executor()
    executor.submit(one)
    one.cancel()
    assert ended(one).state is psij.JobState.CANCELED
    empty_cluster.start_client()
    other = job("true")
    executor.submit(other)
    assert ended(other).state is psij.JobState.COMPLETED
    assert not os.path.exists(tmp_path / "out")


@one_flavour
def test_canceling_a_job_that_has_just_ended_is_no_error(executor, cluster):
    one = job("true")
    executor.submit(one)
    cluster.over(one.native_id)
    one.cancel()
    assert ended(one).state is psij.JobState.COMPLETED


def test_resources_attributes_and_custom_attributes_are_taken(executor, cluster, tmp_path):
    cluster.server.queue("night")
    one = job('cat "$PSIJ_NODEFILE"', stdout_path=tmp_path / "out", name="night work",
              resources=psij.ResourceSpecV1(process_count=2, memory=256 << 20, exclusive_node_use=True),
              attributes=psij.JobAttributes(duration=datetime.timedelta(minutes=10), queue_name="night", account="proj1",
                                            custom_attributes={"pbs.c": "n", "pbs.p": "5", "pbs.m": "n"}))  # fmt: skip
    executor.submit(one)
    assert ended(one).state is psij.JobState.COMPLETED
    nodes = read(tmp_path / "out").split()
    assert len(nodes) == 2 and len(set(nodes)) == 1
    listed = cluster.listed(one.native_id)
    wanted = {"ncpus": 2, "mem": "262144kb", "walltime": "00:10:00"}
    assert {key: listed["Resource_List"].get(key) for key in wanted} == wanted
    assert (listed["queue"], listed["Priority"], listed["Account_Name"]) == ("night", 5, "proj1")


@one_flavour
def test_the_launcher_for_several_processes_runs_them_all(executor, tmp_path):
    one = job('echo "process $_PSI_J_PROCESS_INDEX_"', stdout_path=tmp_path / "out", launcher="multiple",
              resources=psij.ResourceSpecV1(process_count=2))  # fmt: skip
    executor.submit(one)
    assert ended(one).state is psij.JobState.COMPLETED
    assert sorted(read(tmp_path / "out").splitlines()) == ["process 1", "process 2"]


def test_more_than_one_node_is_refused_with_the_reason(executor):
    with pytest.raises(psij.SubmitException) as refused:
        executor.submit(job("true", resources=psij.ResourceSpecV1(node_count=2, processes_per_node=1)))
    assert "node" in str(refused.value) and "Traceback" not in str(refused.value)


@one_flavour
def test_a_job_past_its_walltime_is_failed_and_the_message_says_so(executor):
    one = job("sleep 300", attributes=psij.JobAttributes(duration=datetime.timedelta(seconds=1)))
    executor.submit(one)
    status = ended(one)
    assert status.state is psij.JobState.FAILED
    assert "walltime" in status.message


@one_flavour
def test_the_environment_comes_along_unless_it_is_not_wanted(executor, tmp_path, monkeypatch):
    monkeypatch.setenv("HERITAGE", "kept;'so")
    kept = job('echo "$HERITAGE"', stdout_path=tmp_path / "kept")
    alone = job('echo "${HERITAGE-nothing}"', stdout_path=tmp_path / "alone", inherit_environment=False)
    for one in (kept, alone):
        executor.submit(one)
    assert [ended(one).state for one in (kept, alone)] == [psij.JobState.COMPLETED] * 2
    assert (read(tmp_path / "kept"), read(tmp_path / "alone")) == ("kept;'so\n", "nothing\n")


@one_flavour
def test_another_program_attaches_to_a_job_by_its_id(executor, make_executor, tmp_path):
    one = job("exit 4")
    executor.submit(one)
    other = psij.Job(psij.JobSpec(executable="/bin/false"))
    make_executor().attach(other, one.native_id)
    assert ended(other).state in (
        psij.JobState.FAILED,
        psij.JobState.COMPLETED,
    )  # who reads the exit code first, has it
    assert 4 in (ended(one).exit_code, other.status.exit_code)


@one_flavour
def test_the_list_of_jobs_is_the_ids_of_this_user(empty_cluster, make_executor, monkeypatch):
    monkeypatch.setattr(os, "getlogin", getpass.getuser)  # it needs a terminal, which tests do not have
    executor = make_executor()
    assert executor.list() == []
    jobs = [job("true", name="a name of words") for _ in range(2)]
    for one in jobs:
        executor.submit(one)
    assert executor.list() == [one.native_id for one in jobs]


@one_flavour
def test_an_id_that_nobody_knows_fails_that_job_with_the_commands_words(executor):
    lost = psij.Job(psij.JobSpec(executable="/bin/true"))
    executor.attach(lost, "4711")
    status = ended(lost)
    assert status.state is psij.JobState.FAILED
    assert "4711" in status.message and "153" in status.message
