"""A cluster as its users have it: qsub, qstat and qdel first on the PATH, a server, and a client that runs the jobs."""

import json
import os
import shutil
import subprocess
import tempfile

import pytest
from harness import ROOT, until


class Cluster:
    """What the tools under test find, and what it says when it is asked directly."""

    def __init__(self, lab, server, temp):
        self.lab, self.server, self.temp = lab, server, temp

    def start_client(self, *arguments, max_jobs=2):
        environment = {**os.environ, "TMPDIR": self.temp}
        return self.lab.client(self.server, *arguments, max_jobs=max_jobs, env=environment)

    def run(self, *command):
        """(exit code, stdout, stderr) of a command found on the PATH, as the tools find it."""
        done = subprocess.run(command, cwd=self.lab.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    def listed(self, name):
        """The entry of one job in `qstat -x -f -F json`."""
        code, out, err = self.run("qstat", "-x", "-f", "-F", "json", name)
        assert (code, err) == (0, ""), (code, out, err)
        (job,) = json.loads(out)["Jobs"].values()
        return job

    def over(self, name):
        """That entry once the job is over."""
        return until(
            lambda: (lambda job: job if job["job_state"] == "F" else None)(self.listed(name)), f"{name} to end"
        )

    def until_running(self, name):
        until(lambda: self.listed(name)["job_state"] == "R", f"{name} to run")


@pytest.fixture
def short_temp():
    """A folder for temporary files with a short name: Parsl's workers make sockets there, whose names have 107 bytes."""
    folder = tempfile.mkdtemp(prefix="i-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def empty_cluster(short_temp, lab, tmp_path, monkeypatch):
    """The commands and a server; nothing runs until a client is started."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("qsub", "qstat", "qdel"):
        (commands / name).symlink_to(os.path.join(ROOT, "jobrunner.py"))
    server = lab.server("--offline-after", 0)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JOBRUNNER_SERVER", server.url)
    return Cluster(lab, server, short_temp)


@pytest.fixture
def cluster(empty_cluster):
    """The same with a client of two slots, which waits half a second before it kills."""
    empty_cluster.start_client("--kill-delay", "0.5")
    return empty_cluster
