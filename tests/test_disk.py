"""Entries of folders as people leave them."""

import os
import shutil

import pyarrow.dataset as pads
import pytest

from bcd import disk


def plant(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def link(root, name, target):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, root / name)


def test_files_have_sizes_and_all_else_is_counted(tmp_path):
    plant(tmp_path, "b/2.png", "a.png", ".hidden/x.png", ".DS_Store", "b/._2.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").mkdir()
    found = disk.entries(str(tmp_path))
    assert found.sizes == {"a.png": 5, "b/2.png": 7}
    assert found.faults == {}
    assert found.passed == {disk.HIDDEN: 3, disk.SPECIAL: 1}


def test_a_link_to_a_file_is_a_file(tmp_path):
    plant(tmp_path, "out/1.png", "in/2.png")
    link(tmp_path, "in/1.png", "../out/1.png")
    assert disk.entries(str(tmp_path / "in")).sizes == {"1.png": 9, "2.png": 8}


def test_a_linked_folder_is_followed_once(tmp_path):
    """Under its own path where it has one, else under the first link by name."""
    plant(tmp_path, "out/deep/1.png", "in/z/2.png")
    for name, target in (("a", "z"), ("b", "../out"), ("c", "../out"), ("d", "../out/deep")):
        link(tmp_path, f"in/{name}", target)
    found = disk.entries(str(tmp_path / "in"))
    assert found.sizes == {"z/2.png": 10, "b/deep/1.png": 14}
    assert found.passed == {disk.AGAIN: 3}


def test_loops_end(tmp_path):
    """Crosswise links, each into the folder of all, and one to a folder above the listed one."""
    names = [f"in/{name}" for name in "abcdefgh"]
    for name in names:
        plant(tmp_path, f"{name}/1.png")
        link(tmp_path, f"{name}/all", "..")
        for other in names:
            link(tmp_path, f"{name}/to {other[3:]}", f"../{other[3:]}")
    link(tmp_path, "in/above", "../..")
    found = disk.entries(str(tmp_path / "in"))
    assert sorted(found.sizes) == [f"{name[3:]}/1.png" for name in names]
    assert found.passed == {disk.LOOP: 8 + 8 + 1, disk.AGAIN: 8 * 7}
    assert found.faults == {}


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path):
    plant(tmp_path, "a.png")
    link(tmp_path, "gone.png", "/nowhere/x.png")
    link(tmp_path, "self.png", "self.png")
    link(tmp_path, "through.png", "a.png/x.png")
    with open(os.path.join(os.fsencode(tmp_path), b"b\xff.png"), "wb"):
        pass
    os.mkdir(os.path.join(os.fsencode(tmp_path), b"c\xfe"))
    found = disk.entries(str(tmp_path))
    assert found.sizes == {"a.png": 5}
    assert found.faults == {
        "gone.png": "a link to /nowhere/x.png: No such file or directory",
        "self.png": "a link to self.png: Too many levels of symbolic links",
        "through.png": "a link to a.png/x.png: Not a directory",
        r"b\xff.png": "the name is not in UTF-8; rename it",
        r"c\xfe": "the name is not in UTF-8; rename it",
    }


def test_a_folder_that_is_not_for_us_is_a_fault_and_the_rest_is_listed(tmp_path, monkeypatch):
    plant(tmp_path, "a/1.png", "b/2.png")
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("/a") or str(path).endswith("/b/"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = disk.entries(str(tmp_path))
    assert (found.sizes, found.faults) == (
        {"b/2.png": 7},
        {"a": "the folder cannot be listed: Permission denied"},
    )
    with pytest.raises(PermissionError):
        disk.entries(str(tmp_path / "b"))


def test_a_folder_that_is_removed_meanwhile_is_none_of_the_content(tmp_path, monkeypatch):
    plant(tmp_path, "a/1.png", "b/2.png")
    listed = os.scandir

    def scandir(path):
        if path != f"{tmp_path}/":
            return listed(path)
        found = list(listed(path))
        shutil.rmtree(tmp_path / "a")
        return found

    monkeypatch.setattr(os, "scandir", scandir)
    found = disk.entries(str(tmp_path))
    assert (found.sizes, found.faults) == ({"b/2.png": 7}, {})
    with pytest.raises(FileNotFoundError):
        disk.entries(str(tmp_path / "a"))


def test_a_disk_that_fails_is_no_fault_of_an_entry(tmp_path, monkeypatch):
    plant(tmp_path, "a/1.png")

    def failing(path):
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match="Input/output error"):
        disk.entries(str(tmp_path))


def test_a_long_chain_of_folders_is_no_recursion(tmp_path):
    deep = tmp_path
    for _ in range(200):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "x.png").write_bytes(b"1")
    assert disk.entries(str(tmp_path)).sizes == {"d/" * 200 + "x.png": 1}


def test_a_folder_goes_only_where_nothing_else_is_in_it(tmp_path):
    for name in ("a/.lease", "b/.lease", "c/.lease"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b" / "x").touch()
    (tmp_path / "c" / ".lease" / "y").touch()
    for name in "abcd":
        disk.delete_empty_folder(str(tmp_path / name), ".lease")
    assert [(tmp_path / name).exists() for name in ("a", "b/.lease", "c/.lease/y")] == [False, True, True]


def test_who_reads_a_folder_passes_over_a_file_that_is_being_written(tmp_path, monkeypatch):
    """pyarrow reads every file of a folder but hidden ones, whatever their suffix."""
    seen, replace = [], os.replace

    def replaced(temporary, path):
        seen.extend(os.listdir(tmp_path))
        assert pads.dataset(tmp_path, format="parquet").files == []
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", replaced)
    disk.write_aside(str(tmp_path / "a.parquet"), b"half")
    assert len(seen) == 1
    assert disk.HALF_WRITTEN.search(seen[0])
    assert os.listdir(tmp_path) == ["a.parquet"]


@pytest.mark.parametrize("write", [disk.write_aside, disk.write_in_place])
def test_a_folder_that_goes_while_a_file_is_written_is_made_again(tmp_path, monkeypatch, write):
    """A job that ends deletes folders in which nothing is."""
    gone, makedirs = iter([1, 1]), os.makedirs

    def made(path, exist_ok):
        makedirs(path, exist_ok=exist_ok)
        if next(gone, None):
            os.rmdir(path)

    monkeypatch.setattr(os, "makedirs", made)
    write(str(tmp_path / ".lease" / "a.json"), b"{}")
    assert (tmp_path / ".lease" / "a.json").read_bytes() == b"{}"


def test_a_file_without_a_possible_folder_is_an_error(tmp_path):
    os.symlink(tmp_path / "nowhere" / "b", tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        disk.write_in_place(str(tmp_path / "a"), b"")


def test_what_a_killed_process_left_is_deleted(tmp_path):
    left = tmp_path / "deep" / f"a.parquet.{'0f' * 16}.part"
    kept = [tmp_path / "deep" / name for name in ("a.parquet", "b.part", f"{'0f' * 16}.part.txt")]
    left.parent.mkdir()
    for path in (left, *kept):
        path.touch()
    disk.finish_writes(str(tmp_path))
    assert sorted(left.parent.iterdir()) == sorted(kept)


def test_names_that_a_killed_process_left_will_last(tmp_path, monkeypatch):
    (tmp_path / "work" / "1").mkdir(parents=True)
    synced = []
    monkeypatch.setattr(disk, "sync_folder", synced.append)
    disk.finish_writes(str(tmp_path))
    assert synced == [str(tmp_path), str(tmp_path / "work"), str(tmp_path / "work" / "1")]
