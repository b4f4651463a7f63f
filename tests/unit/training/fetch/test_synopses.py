"""`wheels fetch synopses`: reading apt's index, the choice of packages, and the files they go to."""

import json
import shutil
from pathlib import Path

import pytest

import wheels
from training.fetch import apt, cli
from training.fetch.apt import IndexFiles, Package, index_files, read_packages
from training.fetch.synopses import Synopsis, SynopsisSplits, distinct, joined, synopses

TEXT = "A program that counts the words of all files in a folder and prints one line for each of them. "


def package(name, source=None, synopsis=None, text=None):
    synopsis = synopsis or f"the synopsis of {name} in one line"
    return Package(name, source or name, synopsis, text or f"{name}: {TEXT}\n.\n{TEXT}")


def test_a_description_becomes_one_line():
    text = "Counts words.\n.\nIt reads\n  * files\n  * standard input"
    assert joined(text) == "Counts words. It reads * files * standard input"


def test_one_package_of_each_source_is_taken_and_no_text_twice():
    packages = [
        package("words-doc", source="words"),
        package("words", source="words"),
        package("words-extra", source="words"),
        package("copy", synopsis="the synopsis of words in one line"),
        package("fork", text=f"words: {TEXT} And more."),
        package("short", text="Too short to sum up."),
        package("long", text=15 * TEXT),
        package("mute", synopsis="words"),
        package("last"),
    ]
    assert [found.name for found in distinct(packages)] == ["words", "last"]


def test_an_example_stays_in_its_file_when_the_index_grows_or_is_sorted_otherwise():
    """Each of 21 new packages can move at most one example to another file."""
    packages = [package(f"program{i}") for i in range(2100)]
    before = synopses(packages)
    assert list(map(len, before)) == [100, 1000, 1000]
    assert synopses(packages[::-1]) == before
    grown = synopses([*packages, *(package(f"new{i}") for i in range(21))])
    for old, new in zip(before[1:], grown[1:], strict=True):
        assert len(set(old) - set(new)) <= 21
    assert not set(grown.valid) & set(grown.test)


@pytest.fixture
def index(tmp_path):
    """An index with two packages of one source, and one of another architecture."""
    (tmp_path / "Packages").write_text(
        "Package: words\nSource: words-src (1.2)\nVersion: 1.2\n\nPackage: lone\nVersion: 3\n\n"
    )
    (tmp_path / "Translation-en").write_text(
        "Package: words\nDescription-md5: 0\nDescription-en: counts words\n It counts\n .\n and prints\n\n"
        "Package: foreign\nDescription-en: for another machine\n It runs elsewhere.\n\n"
        "Package: lone\nDescription-en: Größe: 1\n It is alone."
    )
    return IndexFiles("stable", tmp_path / "Packages", tmp_path / "Translation-en")


def test_packages_are_read_from_apts_own_files(index):
    assert list(read_packages(index)) == [
        Package("words", "words-src", "counts words", "It counts\n.\nand prints"),
        Package("lone", "lone", "Größe: 1", "It is alone."),
    ]


def test_the_index_of_debians_main_component_is_taken_by_release():
    rows = [
        ("Packages", "Debian", "main", "stable-updates", "/l/b_Packages"),
        ("Translations", "Debian", "main", "stable-updates", "/l/b_Translation-en"),
        ("Packages", "Debian", "main", "stable", "/l/a_Packages"),
        ("Translations", "Debian", "main", "stable", "/l/a_Translation-en"),
        ("Packages", "Debian", "contrib", "stable", "/l/c_Packages"),
        ("Packages", "Somebody", "main", "stable", "/l/d_Packages"),
    ]
    found = index_files("\n".join(map("\t".join, rows)))
    assert found == [
        IndexFiles("stable", Path("/l/a_Packages"), Path("/l/a_Translation-en")),
        IndexFiles("stable-updates", Path("/l/b_Packages"), Path("/l/b_Translation-en")),
    ]


def test_the_files_are_what_the_task_reads(tmp_path, monkeypatch, capsys):
    splits = SynopsisSplits(
        [Synopsis("Ein längerer Text", "kurz")] * 3, [Synopsis("b", "c")], [Synopsis("d", "e")]
    )
    monkeypatch.setitem(cli.DATASETS, "synopses", cli.Dataset(lambda: splits, "about\n"))
    directory = tmp_path / "data" / "synopses"
    assert wheels.main(["fetch", "synopses", str(directory)]) == 0
    assert capsys.readouterr().out == f"{directory}: 3 train, 1 valid, 1 test\n"
    first, *_ = (directory / "train.jsonl").read_text().splitlines()
    assert json.loads(first) == {"source": "Ein längerer Text", "target": "kurz"}
    assert {file.name for file in directory.iterdir()} == {
        "train.jsonl",
        "valid.jsonl",
        "test.jsonl",
        "README.txt",
    }
    assert wheels.main(["fetch", "synopses", str(directory)]) == 1
    assert capsys.readouterr().err == f"wheels fetch: {directory} exists already\n"


def test_a_machine_without_apt_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert wheels.main(["fetch", "synopses", str(tmp_path / "data")]) == 1
    assert "apt-get is not installed" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_an_error_of_apt_is_passed_on(tmp_path, monkeypatch, capsys):
    fake = tmp_path / "apt-get"
    fake.write_text("#!/bin/sh\necho 'W: one' >&2\necho 'E: no route to host' >&2\nexit 100\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert wheels.main(["fetch", "synopses", str(tmp_path / "data")]) == 1
    assert capsys.readouterr().err == "wheels fetch: apt-get update: E: no route to host\n"


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get")
def test_apt_accepts_the_options_and_writes_the_expected_table(tmp_path):
    """The test downloads nothing: an empty folder has an empty index, or a list of files to fetch."""
    options = [f"Dir::State::lists={tmp_path}"]
    for line in apt._apt(options, "indextargets", "--format", apt.TARGETS).splitlines():
        assert len(line.split("\t")) == 5
