"""Who may write what is loaded: nobody but this user, root, and the administrator of a read-only cache."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from atomr_accel_flashattn.errors import CacheError, CacheWarning
from atomr_accel_flashattn.jit import trust
from atomr_accel_flashattn.jit.cache import KernelCache
from tests.jit.test_cache import CUBIN, KEY, RECORD, filled, part

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes of POSIX")

MALLORY, ADMINISTRATOR = 12345, 23456  # users that need not exist


def give(path: Path, user: int = MALLORY) -> Path:
    """Make everything under ``path`` somebody else's."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    for each in (path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())):
        os.chown(each, user, user, follow_symlinks=False)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def misses(cache: KernelCache, said: str) -> None:
    """A miss with one warning, and with none the second time, not even from a new object."""
    with pytest.warns(CacheWarning, match=said) as caught:
        assert cache.get(KEY) is None
    assert len(caught) == 1
    with quiet():
        assert cache.get(KEY) is None
        assert KernelCache(cache.directory, readonly=cache.readonly).get(KEY) is None


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


# --- the folder -------------------------------------------------------------------------------------------------------------------------


def test_a_planted_cache_of_somebody_else_is_not_loaded_and_not_written(tmp_path: Path):
    planted = give(filled(tmp_path / "shared").directory)
    planted.chmod(0o777)
    cache = KernelCache(planted)
    before = {path: path.stat().st_mtime_ns for path in planted.rglob("*")}
    misses(cache, rf"nothing is loaded from the cache folder .*: it belongs to user {MALLORY}; name a folder of your own")
    with quiet(), cache.single_flight(KEY):
        assert not cache.put(KEY, RECORD, CUBIN, "source")
        assert cache.save_source(KEY, "source") is None
    assert {path: path.stat().st_mtime_ns for path in planted.rglob("*")} == before
    assert cache.verify() == (0, ())
    (problem,) = cache.problems()
    assert problem.startswith(f"{planted}: it belongs to user {MALLORY}")
    with pytest.raises(CacheError, match=f"cannot use the kernel cache .*user {MALLORY}"):
        KernelCache(planted, strict=True).get(KEY)


@pytest.mark.parametrize("wide", [0o777, 0o770, 0o702, 0o2775])
def test_a_wide_folder_of_our_own_is_emptied_and_narrowed_once(tmp_path: Path, wide: int):
    folder = filled(tmp_path / "wide").directory
    (folder / "locks").mkdir(exist_ok=True)
    (folder / "locks" / "planted.lock").symlink_to(tmp_path / "victim")
    (folder / "tuned_tiles.json").write_text("{}")
    folder.chmod(wide)
    cache = KernelCache(folder)
    (problem,) = cache.problems()
    assert f"it is writable by others (mode {wide:04o})" in problem
    assert mode(folder) == wide, "only a call that uses the folder changes it"
    misses(cache, rf"is emptied and set to mode 0700 because it is writable by others \(mode {wide:04o}\): kernels are compiled once more")
    assert mode(folder) == 0o700
    assert sorted(path.name for path in folder.rglob("*")) == ["locks", "tuned_tiles.json.untrusted"]
    with quiet():
        with cache.single_flight(KEY):
            assert cache.put(KEY, RECORD, CUBIN, "source")
        assert KernelCache(folder).get(KEY) is not None
    assert cache.problems() == ()
    assert mode(folder) == 0o700


def test_a_folder_that_others_can_only_read_stays_as_it_is(tmp_path: Path):
    cache = filled(tmp_path / "read")
    cache.directory.chmod(0o755)
    with quiet():
        assert KernelCache(cache.directory).get(KEY) is not None
    assert mode(cache.directory) == 0o755


@pytest.mark.parametrize(("wide", "beside"), [(0o1777, ""), (0o777, "thesis.tex"), (0o777, "package.json")])
def test_a_folder_that_is_not_for_this_cache_alone_is_left_as_it_is(tmp_path: Path, wide: int, beside: str):
    folder = filled(tmp_path / "tmp").directory
    if beside:
        (folder / beside).write_text("mine")
    folder.chmod(wide)
    before = sorted(folder.rglob("*"))
    misses(KernelCache(folder), f"and is left so: it .*{beside}.*; name a folder for this cache alone")
    assert mode(folder) == wide
    assert sorted(folder.rglob("*")) == before


def test_an_emptying_that_was_cut_short_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = filled(tmp_path / "wide").directory
    folder.chmod(0o777)
    monkeypatch.setattr(trust, "_empty", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        KernelCache(folder).get(KEY)
    assert mode(folder) == 0o777
    monkeypatch.undo()
    folder.chmod(0o1700)  # what a kill leaves
    assert KernelCache(folder).problems()
    misses(KernelCache(folder), "is emptied and set to mode 0700 because it was writable by others and is not yet emptied")
    assert (mode(folder), list(folder.glob("*.json"))) == (0o700, [])


def test_no_process_loads_what_lay_in_a_folder_that_many_narrow_at_a_time(tmp_path: Path):
    cache = KernelCache(tmp_path / "wide")
    cache.put(KEY, replace(RECORD, registers=99), CUBIN, "planted")
    cache.directory.chmod(0o777)
    program = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from tests.jit.test_trust import CUBIN, KEY, RECORD, KernelCache\n"
        "cache = KernelCache(sys.argv[1])\n"
        "found = cache.get(KEY) or cache.put(KEY, RECORD, CUBIN, 'source') and cache.get(KEY)\n"
        "sys.exit(bool(found) and found.record.registers == 99)\n"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", program, str(cache.directory)], cwd=Path(__file__).parents[2]) for _ in range(6)]
    assert [rank.wait() for rank in ranks] == [0] * 6
    assert mode(cache.directory) == 0o700
    with quiet():
        assert KernelCache(cache.directory).put(KEY, RECORD, CUBIN, "source")
        entry = KernelCache(cache.directory).get(KEY)
    assert entry is not None
    assert entry.record.registers == RECORD.registers


@pytest.mark.parametrize("ignored", [False, True])
def test_a_mode_that_cannot_be_changed_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignored: bool):
    folder = filled(tmp_path / "squashed").directory
    folder.chmod(0o777)

    def chmod(*_: object, **__: object) -> None:
        if not ignored:  # root on NFS; file systems without modes do nothing
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", chmod)
    misses(KernelCache(folder), "keeps no modes" if ignored else "and is left so: Operation not permitted")
    assert part(KernelCache(folder), ".json").exists()


def test_a_folder_that_cannot_be_looked_at_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = filled(tmp_path / "stale")

    def fail(_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(trust, "_way", fail)
    fresh = KernelCache(tmp_path / "." / "stale" / "..", readonly=True)
    with pytest.warns(CacheWarning, match="cannot read the kernel cache"):
        assert fresh.get(KEY) is None
    with pytest.raises(CacheError, match="cannot read the kernel cache"):
        cache.problems()


def test_folders_are_made_private_and_files_never_writable_by_others(tmp_path: Path):
    with umask(0):
        filled(tmp_path / "a" / "b" / "cache")
        with KernelCache(tmp_path / "a" / "b" / "cache").single_flight(KEY):
            pass
        KernelCache(tmp_path / "ship", strict=True).put(KEY, RECORD, CUBIN, "source")
    for folder in ("a", "a/b", "a/b/cache", "a/b/cache/locks"):
        assert mode(tmp_path / folder) == 0o700
    assert mode(tmp_path / "ship") == 0o755, "other users of the machine that it is shipped to read it"
    files = [*(tmp_path / "a/b/cache").glob("*.*"), *(tmp_path / "ship").iterdir()]
    assert len(files) == 6
    assert {mode(path) for path in files} == {0o644}


def test_another_folder_in_its_place_is_checked_anew(tmp_path: Path):
    cache = filled(tmp_path / "cache")
    assert cache.get(KEY) is not None
    cache.directory.rename(tmp_path / "moved")
    give(filled(tmp_path / "cache").directory)
    misses(cache, f"it belongs to user {MALLORY}")


def test_it_is_walked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = filled(tmp_path / "cache")
    assert cache.get(KEY) is not None
    monkeypatch.setattr(trust, "_way", lambda _: pytest.fail("walked again"))
    assert cache.get(KEY) is not None
    assert KernelCache(cache.directory).get(KEY) is not None


def test_without_posix_owners_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trust, "_POSIX", False)
    cache = filled(tmp_path / "windows")
    cache.directory.chmod(0o777)
    with quiet(), cache.single_flight(KEY):
        assert KernelCache(cache.directory).get(KEY) is not None
    assert (cache.problems(), cache.verify(), mode(cache.directory)) == ((), (1, ()), 0o777)


# --- the way to it ----------------------------------------------------------------------------------------------------------------------


def test_a_folder_above_that_others_can_write_is_refused_but_for_a_sticky_one(tmp_path: Path):
    above = tmp_path / "scratch"
    cache = filled(above / "mine")
    above.chmod(0o1777)
    with quiet():
        assert KernelCache(cache.directory).get(KEY) is not None
    above.chmod(0o777)
    (tmp_path / "link").symlink_to(cache.directory)
    for folder in (cache.directory / "." / ".." / "mine", tmp_path / "link"):
        trust._known.clear()
        trust._said.clear()
        misses(KernelCache(folder), f"{above} is writable by others \\(mode 0777\\); set it with chmod go-w")
    assert mode(cache.directory) == 0o700


def test_a_folder_above_of_somebody_else_is_refused(tmp_path: Path):
    cache = filled(tmp_path / "theirs" / "mine")
    give(tmp_path / "theirs")
    for each in (cache.directory, *cache.directory.iterdir()):
        os.chown(each, 0, 0)
    trust._known.clear()  # a new process
    misses(KernelCache(cache.directory), f"theirs belongs to user {MALLORY}, who can put another folder in its place")


def test_a_link_counts_by_who_made_it(tmp_path: Path):
    cache = filled(tmp_path / "real")
    (tmp_path / "mine").symlink_to("real")
    (tmp_path / "round").symlink_to("round")
    with quiet():
        assert KernelCache(tmp_path / "mine").get(KEY) is not None
    with pytest.raises(OSError, match="symbolic links"):
        trust.examine_folder(str(tmp_path / "round"))
    assert cache.directory.samefile(trust._way(str(tmp_path / "mine" / ".." / "mine"))[0])
    (tmp_path / "theirs").symlink_to("real")
    give(tmp_path / "theirs")
    misses(KernelCache(tmp_path / "theirs"), f"theirs belongs to user {MALLORY}, who can put another folder in its place")


def test_folders_above_the_home_of_this_user_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = filled(tmp_path / "loose" / "home" / ".cache" / "kernels")
    (tmp_path / "loose").chmod(0o777)
    assert trust.examine_folder(str(cache.directory)).problem
    monkeypatch.setenv("HOME", str(tmp_path / "loose" / "home"))
    assert not trust.examine_folder(str(cache.directory)).problem
    (tmp_path / "loose" / "home").chmod(0o777)
    assert trust.examine_folder(str(cache.directory)).problem
    (tmp_path / "loose" / "home").chmod(0o700)
    monkeypatch.setenv("HOME", str(tmp_path / "loose" / "home" / "none"))
    assert trust.examine_folder(str(cache.directory)).problem


@pytest.mark.parametrize(
    ("group", "members", "private"), [("alice", [], True), ("alice", ["alice"], True), ("alice", ["bob"], False), ("staff", [], False)]
)
def test_the_private_group_of_a_user_is_the_user(monkeypatch: pytest.MonkeyPatch, group: str, members: list[str], private: bool):
    import grp
    import pwd

    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_name="alice"))
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=group, gr_mem=members))
    folder = os.stat_result((stat.S_IFDIR | 0o775, 1, 1, 1, 1000, 1000, 0, 0, 0, 0))
    assert trust._others_write(folder) is not private
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert trust._others_write(folder), "a user without a name"


def test_in_a_user_namespace_folders_above_may_be_of_users_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = filled(tmp_path / "theirs" / "mine")
    give(tmp_path / "theirs", MALLORY)
    for each in (cache.directory, *cache.directory.iterdir()):
        os.chown(each, 0, 0)
    monkeypatch.setattr(trust, "_owner_outside", lambda: MALLORY)
    assert not trust.examine_folder(str(cache.directory)).problem
    give(cache.directory)
    assert "belongs to user" in trust.examine_folder(str(cache.directory)).problem


@pytest.mark.parametrize(
    ("uid_map", "outside"), [("0 0 4294967295", None), ("1000 1000 1", 65534), ("0 1000 1\n1 100000 65536", None), (None, None)]
)
def test_the_owner_that_users_outside_a_namespace_show(monkeypatch: pytest.MonkeyPatch, uid_map: str | None, outside: int | None):
    def read_text(path: Path, **_: object) -> str:
        if uid_map is None:
            raise FileNotFoundError(path)
        return {"uid_map": uid_map, "overflowuid": "65534\n"}[path.name]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert trust._owner_outside.__wrapped__() == outside


# --- files ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".cubin"])
@pytest.mark.parametrize("planted", ["by somebody else", "writable", "a link"])
def test_an_entry_that_somebody_else_can_have_written_is_a_miss_and_is_replaced(tmp_path: Path, suffix: str, planted: str):
    cache = filled(tmp_path / "cache")
    path = part(cache, suffix)
    match planted:
        case "by somebody else":
            give(path)
            said = f"it belongs to user {MALLORY}"
        case "writable":
            path.chmod(0o664)
            said = "it is writable by others (mode 0664)"
        case _:
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
            said = "it is a symbolic link"
    assert cache.problems() == (f"{path.name}: {said}",)
    assert cache.verify() == (0, ())
    assert path.exists(), "people may want to look at it"
    with pytest.warns(CacheWarning, match="is not loaded: it .*; it is compiled again. atomr-flashattn cache verify"):
        assert cache.get(KEY) is None
    with quiet():
        assert cache.get(KEY) is None
        assert cache.put(KEY, RECORD, CUBIN, "source")
        assert cache.get(KEY) is not None
    assert (cache.problems(), cache.verify()) == ((), (1, ()))


@pytest.mark.parametrize("size", [0, 1, 5, 1000, 100_000])
def test_a_file_is_read_whole_however_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    path.chmod(0o600)
    known = trust.examine_folder(str(tmp_path))
    assert trust.read_trusted(str(path), known) == path.read_bytes()
    read = os.read
    monkeypatch.setattr(trust.os, "read", lambda file, count: read(file, min(count, 1 + size // 7)))
    assert trust.read_trusted(str(path), known) == path.read_bytes()


def test_what_is_no_file_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert trust.file_problem((tmp_path / "pipe").lstat(), frozenset({os.geteuid()})) == "it is no regular file"


def test_files_are_never_written_through_a_link(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    target = tmp_path / "entry.json"
    (tmp_path / f".new-{os.getpid()}-{threading.get_ident()}-{target.name}").symlink_to(victim)
    target.symlink_to(victim)
    trust.write_file(target, b"new")
    assert (victim.read_text(), target.read_text(), target.is_symlink()) == ("precious", "new", False)
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "entry.json"}


@pytest.mark.parametrize("planted", ["link", "wide", "theirs"])
def test_locks_that_others_can_write_are_not_opened(tmp_path: Path, planted: str):
    cache = filled(tmp_path / "cache")
    locks, elsewhere = cache.directory / "locks", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if planted == "link":
        locks.symlink_to(elsewhere)
    else:
        locks.mkdir()
        locks.chmod(0o777)
        if planted == "theirs":
            give(locks).chmod(0o755)
    with quiet(), cache.single_flight(KEY):
        assert cache.put(KEY, RECORD, CUBIN, "source")
    assert (list(locks.iterdir()), list(elsewhere.iterdir())) == ([], [])


# --- the cache of an administrator ------------------------------------------------------------------------------------------------------


def test_an_administrators_cache_is_loaded_where_it_is_declared(tmp_path: Path):
    folder = give(filled(tmp_path / "opt" / "kernels").directory, ADMINISTRATOR)
    folder.chmod(0o755)
    shared = KernelCache(folder, readonly=True)
    with quiet():
        assert shared.get(KEY) is not None
    assert (shared.problems(), shared.verify()) == ((), (1, ()))
    misses(KernelCache(folder), "or set ATOMR_FLASHATTN_CACHE_READONLY=1 if this is the cache of an administrator whose code you run")


def test_root_is_an_administrator_without_being_declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    give(tmp_path, 0)
    folder = filled(tmp_path / "kernels").directory
    monkeypatch.setattr(os, "geteuid", lambda: MALLORY)
    monkeypatch.setattr(trust, "_home", lambda way: next(name for name in way if name == str(tmp_path.parent)))
    with quiet():
        assert KernelCache(folder).get(KEY) is not None


def test_a_declared_cache_that_anybody_could_have_made_is_refused(tmp_path: Path):
    folder = give(filled(tmp_path / "tmp" / "kernels").directory, MALLORY)
    (tmp_path / "tmp").chmod(0o1777)
    misses(KernelCache(folder, readonly=True), f"it belongs to user {MALLORY} and stands where everybody may make one")


@pytest.mark.parametrize(("what", "said"), [("file", f"it belongs to user {MALLORY}"), ("folder", "theirs belongs to user")])
def test_in_a_declared_cache_only_files_of_its_owner_and_root_are_loaded(tmp_path: Path, what: str, said: str):
    folder = give(filled(tmp_path / "theirs" / "kernels").directory, ADMINISTRATOR)
    give(part(KernelCache(folder), ".cubin"), MALLORY if what == "file" else 0)
    if what == "folder":
        os.chown(tmp_path / "theirs", MALLORY, MALLORY)
    misses(KernelCache(folder, readonly=True), said)


def test_a_declared_cache_is_never_changed(tmp_path: Path):
    folder = filled(tmp_path / "kernels").directory
    folder.chmod(0o777)
    misses(KernelCache(folder, readonly=True), r"it is writable by others \(mode 0777\); its owner sets it with chmod go-w")
    assert mode(folder) == 0o777
    assert part(KernelCache(folder), ".json").exists()
