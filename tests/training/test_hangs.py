"""A rank that hangs, is stopped or dies is reported with its position, whatever it does, and all ranks end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from helpers.launch import HANG_S
from helpers.marks import full
from helpers.tiny_run import tiny

from delib_fast.config import ConfigError
from delib_fast.engine.processes import Process
from delib_fast.training.heartbeats import Heartbeat, HeartbeatFolder
from delib_fast.training.watchdog import Watchdog


def run_with_fault(fork_server, folder, kind, world_size, *more):
    """Every rank must end by itself. The time limit is only there for a test that would never end."""
    job = fork_server.start("hang_worker:main", [tiny(folder), kind, *more], world_size=world_size, LAUNCHED="yes")
    began = time.monotonic()
    codes = fork_server.wait(job)
    output = "\n".join(fork_server.output(job))
    assert time.monotonic() - began < HANG_S, f"a rank had to be killed by the test:\n{output}"
    return codes, output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        (
            "sleeps_in_python",
            [
                "hangs, and all others wait for it",
                "aft step 3: forward of micro-batch 1",
                "in sleeps_in_python",
            ],
        ),
        ("keeps_the_lock", ["aft step 3: forward of micro-batch 1", "in keeps_the_lock"]),
        ("is_stopped", ["has sent no heartbeat", "aft step 3: forward of micro-batch 1"]),
        (
            "is_killed",
            ["rank 1 (process ", " ended at: aft step 3: forward of micro-batch 1", "the same command resumes"],
        ),
    ],
)
def test_the_rank_at_fault_is_reported_and_both_end(tmp_path, fork_server, kind, messages):
    codes, output = run_with_fault(fork_server, tmp_path, kind, 2)
    assert all(codes), f"{codes}: every rank must end with an error\n{output}"
    assert "rank 1 (process " in output
    for message in messages:
        assert message in output, output
    assert output.count("error: ") == 1, "one rank reports it"
    assert "rank 0 (process" not in output, "the rank that only waits is not blamed"


@pytest.mark.slow
def test_a_single_rank_that_hangs_ends_with_its_stack(tmp_path, fork_server):
    codes, output = run_with_fault(fork_server, tmp_path, "sleeps_in_python", 1)
    assert codes == [3], output
    assert "in sleeps_in_python" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "moment", "message"),
    [
        ("is_stopped", "exporting", "has sent no heartbeat for "),
        full("is_killed", "exporting", "has ended"),
        full("is_stopped", "encoding", "has sent no heartbeat for "),
        full("is_killed", "encoding", "has ended"),
        full("keeps_the_lock", "encoding", "in keeps_the_lock"),
    ],
)
def test_a_rank_is_missed_while_another_one_works_for_long(tmp_path, fork_server, kind, moment, message):
    codes, output = run_with_fault(fork_server, tmp_path, kind, 2, moment)
    assert all(codes), f"{codes}: every rank must end with an error\n{output}"
    assert "rank 1 (process " in output
    assert message in output, output
    assert output.count("error: ") == 1, "one rank reports it"
    assert "rank 0 (process" not in output, "the rank that only works is not blamed"


@pytest.mark.slow
def test_ranks_with_other_numbers_of_steps_end(tmp_path, fork_server):
    """The comparison before the first step would refuse them; here they differ only later."""
    codes, output = run_with_fault(fork_server, tmp_path, "-", 2, "making_other_steps")
    assert all(codes), f"{codes}: every rank must end with an error\n{output}"
    assert output.count("error: ") == 1, output
    assert "rank 1 (process " in output


@pytest.mark.full
def test_a_collective_that_only_one_rank_calls_ends_both(tmp_path, fork_server):
    """A callback may take long, but here rank 0 waits in it for rank 1, which waits in the next step."""
    codes, output = run_with_fault(fork_server, tmp_path, "-", 2, "in_a_callback")
    assert all(codes), f"{codes}: every rank must end with an error\n{output}"
    assert "callback UnevenCallback" in output
    assert output.count("error: ") == 1, output


@pytest.mark.full
def test_a_rank_that_works_for_long_is_left_alone(tmp_path, fork_server):
    codes, output = run_with_fault(fork_server, tmp_path, "-", 2, "one_exports_for_long")
    assert codes == [0, 0], output


# --- the verdict, with a clock of the test --------------------------------------------------------------------

HERE = Process.current()
LIMIT = 100.0


def heartbeat(beat=1, moves=1, **changes):
    return replace(Heartbeat(beat, moves, 1, False, False, False, "somewhere"), **changes)


@pytest.fixture
def watch(tmp_path):
    """A watchdog of rank 0 that has seen heartbeats of ranks 1 and 2 at time 0, and the folders of all ranks."""
    folders = [HeartbeatFolder(tmp_path / ".ranks", rank) for rank in range(3)]
    dog = Watchdog(tmp_path / ".ranks", 0, dict.fromkeys(range(3), HERE), LIMIT)
    dog._files, dog._moved = folders[0], 0.0
    for folder in folders[1:]:
        folder.write(heartbeat())
    dog._look(0.0)
    return dog, folders


def test_a_heart_that_stops_is_silent_also_during_local_work(watch):
    dog, folders = watch
    folders[1].write(heartbeat(beat=2, local=True))
    for now in (50.0, 99.0):
        dog._look(now)
        assert dog._silent(now) == []
    dog._look(130.0)
    assert dog._silent(130.0) == [2]
    assert dog._silent(151.0) == [1, 2]


def test_ranks_that_move_or_work_do_not_hang(watch):
    dog, folders = watch
    for folder in folders[1:]:
        folder.write(heartbeat(beat=2))
    dog._look(101.0)
    assert dog._all_wait(101.0)
    folders[2].write(heartbeat(beat=3, moves=2))
    dog._look(102.0)
    assert not dog._all_wait(102.0), "rank 2 has moved"
    for now in (150.0, 300.0):
        folders[1].write(heartbeat(beat=int(now), local=True))
        folders[2].write(heartbeat(beat=int(now), moves=2))
        dog._look(now)
        assert not dog._all_wait(now), "rank 1 does local work"
    folders[1].write(heartbeat(beat=400, local=False))
    dog._look(401.0)
    assert dog._all_wait(401.0)


def test_a_rank_that_ended_with_an_error_gets_a_moment(watch):
    dog, folders = watch
    folders[1].write(heartbeat(beat=2, ended=True))
    dog._look(20.0)
    assert dog._silent(25.0) == []
    assert dog._silent(31.0) == [1]


def test_a_rank_that_has_finished_is_not_missed(watch):
    dog, folders = watch
    folders[1].close(delete=True)
    dog._look(99.0)
    assert dog._silent(1000.0) == [2]


def test_waiting_inside_local_work_counts(watch):
    dog, _ = watch
    with dog.local_work("a callback"):
        assert dog._heartbeat().local
        with dog.waiting():
            assert (dog._heartbeat().local, dog._heartbeat().waits) == (False, True)
        assert (dog._heartbeat().local, dog._heartbeat().waits) == (True, False)
    assert not dog._heartbeat().local
    assert dog._heartbeat().order == 0, "only positions that all ranks reach count"


def test_only_the_lowest_living_rank_watches_all(tmp_path):
    folders = [HeartbeatFolder(tmp_path / ".ranks", rank) for rank in range(3)]
    dog = Watchdog(tmp_path / ".ranks", 1, dict.fromkeys(range(3), HERE), LIMIT)
    dog._files = folders[1]
    for folder in (folders[0], folders[2]):
        folder.write(heartbeat())
    dog._look(0.0)
    assert dog._seen.keys() == {0}
    folders[2].write(heartbeat(beat=2))
    dog._look(150.0)
    assert dog._silent(150.0) == [0], "and rank 2, which it sees now for the first time, is not silent"
    assert dog._seen.keys() == {0, 2}


# --- files that other users may have written ------------------------------------------------------------------


def test_planted_files_are_ignored(tmp_path):
    folder = HeartbeatFolder(tmp_path / ".ranks", 0)
    (tmp_path / "elsewhere").write_text(json.dumps(asdict(heartbeat())))
    (tmp_path / ".ranks" / "rank-00001.json").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / ".ranks" / "rank-00002.json")
    (tmp_path / ".ranks" / "rank-00003.json").write_text("[" * 100_000)
    (tmp_path / ".ranks" / "rank-00004.json").write_text('{"pid": 1}')
    (tmp_path / ".ranks" / "rank-00005.json").write_text('{"beat": "1", "moves": 1, "order": 1, "local": false,')
    assert [folder.read(rank) for rank in range(1, 6)] == [None] * 5
    (tmp_path / ".ranks" / "rank-00001.stack").symlink_to("/etc/passwd")
    (tmp_path / ".ranks" / "rank-00002.stack").write_text("a\x1b[2Jb\nc")
    assert [folder.read_stack(rank) for rank in (1, 2)] == ["", "a[2Jb\nc"]


def test_the_files_of_other_users_are_ignored(tmp_path):
    folder = HeartbeatFolder(tmp_path / ".ranks", 0)
    folder.write(heartbeat())
    assert folder.read(0) == heartbeat()
    folder._user += 1
    assert folder.read(0) is None
    assert not folder.has_verdict()


def test_a_planted_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name in ("link", "file"):
        with pytest.raises(ConfigError, match=f"{name} is not a folder of this run"):
            HeartbeatFolder(tmp_path / name, 0)
    with pytest.raises(ConfigError, match="open can be written to by other users; delete it, or give another run_dir"):
        HeartbeatFolder(tmp_path / "open", 0)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_planted_file_is_not_written_through(tmp_path):
    """The rank's own file is created, never opened: a link that was there is replaced."""
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / ".ranks").mkdir(mode=0o700)
    for name in ("rank-00000.json", "rank-00000.stack"):
        (tmp_path / ".ranks" / name).symlink_to(victim)
    folder = HeartbeatFolder(tmp_path / ".ranks", 0)
    folder.write(heartbeat())
    folder.stack.write("a stack")
    folder.close(delete=True)
    assert victim.read_text() == "untouched"


def test_one_rank_gives_the_verdict(tmp_path):
    folders = [HeartbeatFolder(tmp_path / ".ranks", rank) for rank in range(2)]
    assert not folders[1].has_verdict()
    assert [folder.claim_verdict() for folder in folders] == [True, False]
    assert folders[1].has_verdict()


# --- which process gets a signal ------------------------------------------------------------------------------


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def process_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    numbers = {"parent": 1, "group": 2, "session": 3, "started": 19}
    return replace(HERE, pid=pid, **{name: int(fields[index]) for name, index in numbers.items()})


def test_a_rank_of_this_job_is_killed(child):
    assert process_of(child.pid).kill() is None
    assert child.wait(600) == -signal.SIGKILL
    assert process_of(os.getpid()).kill() == "it is this process"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"started": 1}, "it has ended, and its number may belong to another process"),
        ({"boot": "another"}, "it runs on another machine or in another container"),
        ({"namespace": "another"}, "it runs on another machine or in another container"),
        ({"pid": 1 << 22}, "it cannot be opened: "),
    ],
)
def test_another_process_is_not_killed(child, change, reason):
    assert replace(process_of(child.pid), **change).kill().startswith(reason)
    assert child.poll() is None


def test_a_process_of_another_job_is_not_killed(tmp_path):
    """It has the user of this process, but another parent, session and process group."""
    code = (
        "import subprocess, sys\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "print(subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL).pid)"
    )
    output = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    pid = int(output)
    try:
        stranger = process_of(pid)
        assert stranger.kill() == "it has another parent, session and process group than this rank"
        assert not stranger.has_ended
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_process_that_has_ended_is_known(child):
    process = process_of(child.pid)
    assert not process.has_ended
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.has_ended, "a zombie has ended"
    child.wait()
    assert process.has_ended
    assert not replace(process, boot="another machine").has_ended, "nothing is known about it"


def test_processes_are_read_from_checked_data():
    assert Process.from_data(json.loads(json.dumps(HERE.to_data()))) == HERE
    for wrong in ({"pid": "1"}, {"pid": True}, {"host": 3}, {"started": None}):
        with pytest.raises(ValueError, match="does not describe a process"):
            Process.from_data(HERE.to_data() | wrong)
