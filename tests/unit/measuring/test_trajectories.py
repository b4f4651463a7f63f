"""Files of trajectories: whole lines, a largest size, and every fault with its place."""

from pathlib import Path

import pytest

from measuring.json_lines import DataError
from measuring.trajectories import Trajectory, TrajectoryFile, read_trajectories

ONE = Trajectory([1, 2], [3, 4, 5], [(1, 3)], 0.1)
LINE = '{"prompt":[1,2],"tokens":[3,4,5],"spans":[[1,3]],"budget":0.1}\n'


def test_written_trajectories_are_read_in_order(tmp_path: Path) -> None:
    alone = Trajectory([7], [8])
    for name, trajectories in (("b", [alone]), ("a", [ONE, ONE])):
        file = TrajectoryFile(tmp_path / f"{name}.jsonl", 1000)
        assert all(map(file.add, trajectories))
    assert list(read_trajectories(tmp_path)) == [ONE, ONE, alone]
    assert ONE.by_teacher == [False, True, True]
    assert alone.by_teacher == [False]


def test_a_file_takes_whole_lines_until_it_is_full(tmp_path: Path) -> None:
    file = TrajectoryFile(tmp_path / "a.jsonl", 2 * len(LINE) + 1)
    assert [file.add(ONE), file.add(ONE), file.add(ONE)] == [True, True, False]
    assert (tmp_path / "a.jsonl").read_text() == 2 * LINE


def test_a_line_that_a_killed_process_left_unfinished_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE + LINE[:20])
    assert list(read_trajectories(tmp_path)) == [ONE]


def test_an_existing_file_is_continued(tmp_path: Path) -> None:
    """In a container every gateway has the same host name and process id, so a restart finds its file."""
    path = tmp_path / "a.jsonl"
    path.write_text(LINE + LINE[:20])
    file = TrajectoryFile(path, 2 * len(LINE))
    assert [file.add(ONE), file.add(ONE)] == [True, False]
    assert path.read_text() == 2 * LINE


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{}", "missing required field"),
        ("no JSON", "malformed"),
        ('{"prompt":[],"tokens":[1]}', "no token"),
        ('{"prompt":[1],"tokens":[]}', "no token"),
        ('{"prompt":[1],"tokens":[1,2],"spans":[[1,3]]}', "do not fit"),
        ('{"prompt":[1],"tokens":[1,2],"spans":[[1,2],[0,1]]}', "do not fit"),
    ],
)
def test_a_line_without_a_completion_is_named(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(LINE + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{problem}"):
        list(read_trajectories(tmp_path))


def test_a_directory_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file"):
        list(read_trajectories(tmp_path))
