"""Stages of the GPU benchmark: nothing that breaks loses the rest."""

import os
import subprocess
from dataclasses import replace
from unittest import mock

import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu.results import Results
from benchmarks.gpu.stage import Job, SkippedError, Stage
from benchmarks.gpu.worker import CONTEXT_LOST, work


def jobs_of(*jobs: Job) -> Stage:
    return Stage("check", 1.0, 60.0, lambda setting: iter(jobs))


def test_one_broken_case_does_not_lose_the_others(setting):
    def fail():
        raise ValueError("no such luck")

    def skip():
        raise SkippedError("nothing to do")

    fine = mock.Mock(return_value={"config": "x"})
    stage = jobs_of(Job("a", fail), Job("b", skip), Job("c", fine), Job("d", fine, 1e6))
    assert work(stage, setting) == 0
    found = {record["case"]: record for record in Results.load(setting.results.path).records}
    assert [found[case]["status"] for case in "abcd"] == ["failed", "skipped", "ok", "skipped"]
    assert found["a"]["error"] == "ValueError: no such luck"
    assert found["d"]["error"] == "no time left"
    assert work(stage, setting) == 0  # all have records
    assert fine.call_count == 1


def test_a_lost_gpu_ends_the_process(setting):
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    with mock.patch("torch.cuda.synchronize", side_effect=lost):
        later = mock.Mock()
        stage = jobs_of(Job("a", mock.Mock(side_effect=lost)), Job("b", later))
        assert work(stage, replace(setting, device="cuda")) == CONTEXT_LOST
    assert not later.called


class Worker:
    """Stands in for a process that works on the file of results."""

    def __init__(self, act, status):
        self.act, self.status, self.killed = act, status, False

    def wait(self, timeout=None):
        if self.act == "hang" and not self.killed:
            raise subprocess.TimeoutExpired("worker", timeout)
        return -9 if self.killed else self.status

    def kill(self):
        self.killed = True


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_a_stage_goes_on_after_a_crash_or_a_hang(setting, how):
    path, workers = setting.results.path, []

    def start(command, cwd):
        results = Results.load(path)
        if not workers:
            results.begin("check", "bad")
            if how == "hang":
                os.utime(path, (0, 0))
        else:
            results.add("check", "good", "ok", {})
        workers.append(Worker(how if not workers else "end", 0 if workers else -11))
        return workers[-1]

    with mock.patch.object(program.subprocess, "Popen", start):
        results = program._run("check", setting.results, 60.0, "auto", [])
    assert [(r["case"], r["status"]) for r in results.records] == [
        ("bad", "failed"),
        ("good", "ok"),
    ]
    assert results.records[0]["requested"] == "auto"
    assert ("-11" if how == "crash" else "hung") in results.records[0]["error"]
    assert workers[0].killed == (how == "hang")


def test_the_file_is_whole_while_it_is_written(setting):
    with mock.patch("os.replace", side_effect=OSError), pytest.raises(OSError):
        setting.results.add("check", "a", "ok", {})
    assert Results.load(setting.results.path).records == []
