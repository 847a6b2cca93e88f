"""The example file, as the README's first command runs it."""


import os

from harness import ROOT


def test_the_example_runs_and_every_job_finishes(lab):
    code, out, err = lab.command("run", os.path.join(ROOT, "jobs.json.example"))
    assert code == 0, err
    assert "5 of 5 jobs finished" in out
    assert "who-am-i" in out and err.strip().endswith("00:00:00 left")
