"""Records that survive kills and full disks; configurations in and out of JSON."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import termios
from itertools import pairwise
from pathlib import Path

import pytest

from openmoba.lab.arms import ArmConfig
from openmoba.lab.config import (
    DataConfig,
    EvalConfig,
    RunConfig,
    TrainConfig,
    changes,
    default_range,
    from_dict,
    spaced_steps,
    to_dict,
)
from openmoba.lab.progress import TerminalProgress, bar, duration
from openmoba.records import disk
from openmoba.records.compact import pack, rounded, unpack
from openmoba.records.locks import claim, holder, lock


def test_appended_rows_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 2.5, "name": "ä\n"}, {"step": 2, "loss": 0.1, "parts": [1, None]}]
    for row in rows:
        disk.append(path, row)
    assert disk.read(path) == rows
    assert disk.read(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"{", '{"name": "ä'.encode()[:-1]])
def test_a_torn_last_line_is_skipped_and_cut_off_by_the_next_append(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    disk.append(path, {"step": 1})
    with path.open("ab") as file:
        file.write(torn)
    assert disk.read(path) == [{"step": 1}]
    disk.append(path, {"step": 2})
    assert disk.read(path) == [{"step": 1}, {"step": 2}]


def test_a_torn_line_longer_than_the_read_buffer_is_cut_off_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    disk.append(path, {"step": 1})
    with path.open("ab") as file:
        file.write(b'{"x": "' + b"a" * 200_000)
    disk.append(path, {"step": 2})
    assert disk.read(path) == [{"step": 1}, {"step": 2}]


def test_a_full_disk_leaves_whole_lines_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a torn line too: where the file is cut back to is where its whole lines end."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "metrics.jsonl"
    disk.append(path, {"step": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 2, "pad": "xxxxxxxx')
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match="No space left on device; make room"):
        disk.append(path, {"step": 2})
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\nbroken\n{"step":3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        disk.read(path)


def test_a_lock_is_held_by_one_and_dropped_with_its_body(tmp_path: Path) -> None:
    for _ in range(2):
        with lock(tmp_path / "cache.lock") as mine, lock(tmp_path / "cache.lock", wait=False) as other:
            assert mine is not None
            assert other is None


def test_a_writer_killed_at_any_moment_leaves_every_earlier_line_readable(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import itertools, sys; from pathlib import Path; from openmoba.records.disk import append\n"
        "for step in itertools.count():\n"
        "    append(Path(sys.argv[1]), {'step': step, 'pad': 'x' * 1000}); print(step, flush=True)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    announced = [int(writer.stdout.readline()) for _ in range(20)][-1]
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    steps = [row["step"] for row in disk.read(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > announced


def test_numbers_that_json_cannot_say_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss=nan"):
        disk.append(tmp_path / "metrics.jsonl", {"loss": float("nan")})
    with pytest.raises(ValueError, match=r"compute\.6nd=inf"):
        disk.write_json(tmp_path / "result.json", {"compute": {"6nd": float("inf")}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full")
def test_a_full_disk_is_one_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        disk.append(path, {"step": 1})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    disk.write_json(path, {"tokens": 1})
    with pytest.raises(TypeError):
        disk.write_json(path, {"tokens": object()})
    assert disk.read_json(path) == {"tokens": 1}
    disk.keep(tmp_path / "metrics.jsonl", [{"step": 1}, {"step": 2}])
    assert len(disk.read(tmp_path / "metrics.jsonl")) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"result.json", "metrics.jsonl"}
    with pytest.raises(ValueError, match=r"cannot write .*absent"):
        disk.write_json(tmp_path / "absent" / "result.json", {})


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), ("{", "not JSON"), ("[1]", "holds a list")])
def test_an_unreadable_json_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        disk.read_json(path)


def test_numbers_are_rounded_to_six_digits_wherever_they_stand() -> None:
    row = {"a": 1.23456789, "b": [1234567.8, None, (2 / 3e5, 7)], "c": {"d": 123456789, "e": True, "f": "1.23456789"}}
    said = {"a": 1.23457, "b": [1234570.0, None, [6.66667e-6, 7]], "c": row["c"]}
    assert rounded(row) == said == rounded(said)


def test_packed_lists_are_read_back_as_they_were() -> None:
    values = [[1.23457, None, 0.1], [1e-300, -0.0, 12345.6]]
    assert unpack(pack(values), "") == values
    assert unpack(pack([]), "") == []


@pytest.mark.parametrize("text", [[[1.5, 2.5]], None, "1.5", "AAAA", pack([1.5])[:-4], pack({"a": 1})])
def test_what_is_no_packed_list_is_named(text: object) -> None:
    with pytest.raises(ValueError, match=r"^here (is no packed list but|holds a dict, not a list).*; restore the file"):
        unpack(text, "here")


def test_configurations_survive_json() -> None:
    config = RunConfig(
        data=DataConfig(valid="x.txt", length=64),
        arm=ArmConfig("hybrid", 16, 2, full_layers=(0, 3)),
        train=TrainConfig(loss_tokens=8),
    )
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(RunConfig, {}) == RunConfig()


def test_another_seed_is_another_run() -> None:
    assert changes(RunConfig(), RunConfig(train=TrainConfig(seed=1))) == ["train.seed was 0 and is 1"]


def test_ranges_are_an_eighth_of_short_windows() -> None:
    assert [default_range(length) for length in (4, 1024, 16384, 32768)] == [1, 128, 2048, 2048]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"datas": {}}, "unknown key 'datas'; the keys of RunConfig are data, model, arm, train, eval"),
        ({"data": {"lenght": 3}}, r"unknown key 'data\.lenght'; the keys of data are source, valid"),
        ({"data": {"length": "3"}}, r"data\.length must be int, got '3'"),
        ({"data": {"length": True}}, r"data\.length must be int, got True"),
        ({"train": {"clip": True}}, r"train\.clip must be float, got True"),
        ({"data": {"valid": 3}}, r"data\.valid must be str or none, got 3"),
        ({"train": {"schedule": "linear"}}, r"train\.schedule must be 'cosine' or 'wsd', got 'linear'"),
        ({"arm": {"name": "sparse"}}, r"arm\.name must be 'full' or 'moba'"),
        ({"arm": {"full_layers": [1, "2"]}}, r"arm\.full_layers must be int, got '2'"),
        ({"arm": {"top_k": 0}}, "top_k must be >= 1, got 0"),
        ({"model": {"overrides": {"rope": []}}}, r"overrides\.rope must be bool or int or float or str or none"),
        ({"arm": 3}, "arm must be a table"),
        ({"train": {"steps": 0}}, r"train\.steps must be >= 1, got 0"),
        ({"train": {"warmup": 1.5}}, r"train\.warmup is a share"),
        ({"train": {"checkpoint_every": 15}}, r"checkpoint_every=15 must be a multiple of train\.log_every=10"),
        ({"eval": {"every": 5, "count": 5}}, r"eval\.every=5 and eval\.count=5 exclude each other"),
        ({"eval": {"count": 201}}, r"eval\.count=201 is more than train\.steps=200"),
        ({"eval": {"trailing": 2000}}, r"eval\.trailing=2000 is more than a window of data\.length=1024"),
    ],
)
def test_bad_configurations_name_the_key_and_what_is_allowed(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, values).check()


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (12, 5), (7, 7), (10, 2), (4300, 16), (100, 90)])
def test_spaced_evaluations_are_even_in_the_logarithm_of_the_step(steps: int, count: int) -> None:
    found = spaced_steps(steps, count)
    assert len(found) == len(set(found)) == count
    assert found[-1] == steps
    assert count == 1 or found[0] == 1
    if count == 16:  # beyond the first few steps, which are whole numbers
        ratios = [b / a for a, b in pairwise(found[6:])]
        assert max(ratios) / min(ratios) < 1.05
    config = RunConfig(train=TrainConfig(steps=steps), eval=EvalConfig(count=count))
    config.check()
    assert config.evaluation_steps == found


def test_spaced_evaluations_are_at_the_nearest_step() -> None:
    assert spaced_steps(100, 4) == (1, 5, 22, 100)  # 4.64 and 21.54


def test_evaluations_in_even_steps_end_with_the_last() -> None:
    steps = [
        RunConfig(train=TrainConfig(steps=12), eval=EvalConfig(every=n)).evaluation_steps for n in (5, 6, 50, None)
    ]
    assert steps == [(5, 10, 12), (6, 12), (12,), (12,)]


def test_arms_say_what_attention_each_step_has() -> None:
    assert ArmConfig("full").attention(0, 10) is None
    assert ArmConfig("moba", 16, 2).attention(9, 10) == ArmConfig("time_hybrid", 16, 2).attention(7, 10)
    assert ArmConfig("time_hybrid", switch_at=0.8).attention(8, 10) is None
    assert ArmConfig("time_hybrid", switch_at=0.29).moba_steps(100) == range(29), "though 100 * 0.29 is a little less"
    hybrid = ArmConfig("hybrid", full_layers=2).attention(0, 10)
    assert hybrid is not None
    assert hybrid.full_layer_indices(5) == {3, 4}


def test_progress_without_a_terminal_goes_by_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step, the last, and one in 30 seconds, however many steps there are."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = TerminalProgress("run", sys.stderr)
    progress.stream = sys.stderr
    for done in range(1, 2001):
        now = done / 16  # 125 seconds
        progress.step(done, 2000, "loss 1.0")
    now += 60
    progress.step(1, 2000, "loss 1.0")  # of the next run
    lines = capsys.readouterr().err.splitlines()
    places = ["1/2000", *(f"{done}/2000," for done in (481, 961, 1441, 1921)), "2000/2000", "1/2000"]
    assert [line.split()[2] for line in lines] == places
    assert lines[1] == "run [######..................] 481/2000, 1m35s left  loss 1.0"
    assert lines[5] == "run [########################] 2000/2000  loss 1.0"


def test_progress_on_a_terminal_redraws_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    progress = TerminalProgress("run", stream)
    for done in (1, 2):
        progress.step(done, 2, "loss 1.0")
    progress.note("done")
    assert stream.getvalue().count("\r") == 2
    assert stream.getvalue().endswith("2/2  loss 1.0\ndone\n")
    assert bar(0.5, 4) == "[##..]"
    assert [duration(s) for s in (5, 125, 7500)] == ["5s", "2m05s", "2h05m"]


def test_progress_never_wraps_on_a_narrow_terminal() -> None:
    ours, theirs = os.openpty()
    with open(theirs, "w") as stream:
        termios.tcsetwinsize(theirs, (24, 30))
        progress = TerminalProgress("run", stream)
        for done in (1, 2):
            progress.step(done, 2, "loss 1.0")
        told = ""
        while not told.endswith("\n"):  # what is written arrives in any number of pieces
            told += os.read(ours, 1000).decode()
    os.close(ours)
    begun, ended = told.split("\r\033[K")[1:]
    assert begun == "run [############............]"
    assert ended == "run [########################] 2/2  loss 1.0\r\n"


def test_a_claim_that_the_disk_does_not_take_is_an_error_with_the_files_name(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/claim\.lock'"), claim(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with claim(tmp_path) as mine:
        assert mine
        assert holder(tmp_path).startswith(f"process {os.getpid()} on ")
