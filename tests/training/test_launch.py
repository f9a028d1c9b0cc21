"""The processes of one run: started, told their place, and ended together."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from clbench.cli.runs import _processes
from clbench.errors import SettingError
from clbench.signals import STATUS
from clbench.training.launch import RENDEZVOUS, Place, _wait, place

WAITS = "import signal; signal.pause()"


def child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", code])


def test_a_process_knows_its_place_by_torchrun_or_by_clbench() -> None:
    by_torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
    assert place(by_torchrun) == Place(rank=3, local=1, size=4, url="env://")
    here = place({**by_torchrun, RENDEZVOUS: "file:///tmp/meeting"})
    assert here is not None
    assert here.url == "file:///tmp/meeting"
    assert place({"RANK": "0", "WORLD_SIZE": "2"}) is None  # other programs set these, too


@pytest.mark.parametrize(
    ("code", "failed", "status"),
    [
        ("raise SystemExit(3)", 1, 3),
        ("import os; os.kill(os.getpid(), 9)", 1, -signal.SIGKILL),
        (f"raise SystemExit({STATUS})", None, STATUS),
        # sent to a process that does not listen yet
        ("import os; os.kill(os.getpid(), 10)", None, -signal.SIGUSR1),
        ("", None, 0),
    ],
)
def test_when_one_process_ends_the_others_do(code: str, failed: int | None, status: int) -> None:
    others = [child(WAITS if code else ""), child(code), child(WAITS if code else "")]
    assert _wait(others) == failed
    assert others[1].returncode == status
    for other in (others[0], others[2]):
        assert other.returncode == (-signal.SIGTERM if code else 0)


def test_more_gpus_than_there_are_and_contradictions_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clbench.reproducibility.gpus", lambda: 2)
    assert (_processes(2, None, "auto"), _processes(None, 3, "auto")) == (2, 3)
    assert _processes(None, None, "cpu") == 1
    with pytest.raises(SettingError, match="not as many GPUs") as err:
        _processes(3, None, "auto")
    assert "--gpus 2" in str(err.value)
    with pytest.raises(SettingError, match="where to compute"):
        _processes(2, 2, "auto")
    monkeypatch.setattr("clbench.reproducibility.gpus", lambda: 0)
    with pytest.raises(SettingError, match="--processes N"):
        _processes(1, None, "auto")
