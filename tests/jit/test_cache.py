from __future__ import annotations

import errno
import json
import os
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from atomr_accel_flashattn.errors import CacheError, CacheWarning
from atomr_accel_flashattn.jit.cache import CacheKey, KernelCache, Record

KEY = CacheKey("fa2_fwd_sm80", "ab" * 32)
CUBIN = b"\x7fELF" + bytes(5000)
RECORD = Record(
    name=KEY.name,
    key=KEY.digest,
    arch="sm_80",
    nvrtc="13.0",
    registers=42,
    spill_bytes=8,
    static_shared_bytes=16,
    compile_seconds=0.5,
    log="ok",
)


def filled(folder: Path) -> KernelCache:
    cache = KernelCache(folder)
    assert cache.put(KEY, RECORD, CUBIN, "source")
    return cache


def part(cache: KernelCache, suffix: str) -> Path:
    return cache.directory / (KEY.stem + suffix)


def test_what_is_put_is_got_with_its_report(tmp_path: Path):
    cache = filled(tmp_path / "new" / "folder")
    entry = cache.get(KEY)
    assert entry is not None
    assert entry.cubin == CUBIN
    assert (entry.record.registers, entry.record.spill_bytes, entry.record.cubin_bytes) == (42, 8, len(CUBIN))
    assert part(cache, ".cu").read_text() == "source"
    assert cache.get(CacheKey(KEY.name, "cd" * 32)) is None


def test_an_entry_is_raw_and_private_to_nobody(tmp_path: Path):
    before = os.umask(0o022)
    try:
        cache = filled(tmp_path)
    finally:
        os.umask(before)
    assert part(cache, ".cubin").read_bytes() == CUBIN
    assert part(cache, ".cubin").stat().st_mode & 0o777 == 0o644
    assert not list(tmp_path.glob(".new-*"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing cubin", "missing record", "no json", "wrong field", "other key"])
def test_a_damaged_entry_is_a_miss_and_is_replaced(tmp_path: Path, damage: str):
    cache = filled(tmp_path)
    cubin, record = part(cache, ".cubin"), part(cache, ".json")
    match damage:
        case "flip":
            cubin.write_bytes(CUBIN[:-1] + b"\1")
        case "truncate":
            cubin.write_bytes(CUBIN[:1000])
        case "empty":
            cubin.write_bytes(b"")
        case "missing cubin":
            cubin.unlink()
        case "missing record":
            record.unlink()
        case "no json":
            record.write_text("{")
        case "wrong field":
            record.write_text(json.dumps({**json.loads(record.read_text()), "registers": "many"}))
        case "other key":
            record.write_text(json.dumps({**json.loads(record.read_text()), "key": "cd" * 32}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get(KEY) is None
        assert cache.put(KEY, RECORD, CUBIN, "source")
        assert cache.get(KEY) is not None


def test_verify_removes_exactly_the_damaged(tmp_path: Path):
    cache = filled(tmp_path)
    bad = CacheKey("other", "cd" * 32)
    cache.put(bad, replace(RECORD, name="other", key=bad.digest), CUBIN, "source")
    (tmp_path / (bad.stem + ".cubin")).write_bytes(b"short")
    assert cache.verify() == (1, (bad.stem,))
    assert not list(tmp_path.glob("other*"))
    assert cache.verify() == (1, ())
    assert cache.get(KEY) is not None


def test_list_size_and_clear(tmp_path: Path):
    cache = filled(tmp_path)
    (tmp_path / "somebody-elses.txt").write_text("stays")
    with cache.single_flight(KEY):
        pass
    assert [record.name for record in cache.list()] == [KEY.name]
    assert len(cache) == 1
    assert cache.size() > len(CUBIN)
    assert cache.clear() == 1
    assert (len(cache), cache.size(), cache.list()) == (0, 0, ())
    assert {path.name for path in tmp_path.iterdir()} == {"somebody-elses.txt", "locks"}


def test_a_folder_that_is_not_there_is_an_empty_cache(tmp_path: Path):
    cache = KernelCache(tmp_path / "none")
    assert (cache.get(KEY), len(cache), cache.list(), cache.verify(), cache.clear(), cache.size()) == (None, 0, (), (0, ()), 0, 0)
    assert not cache.directory.exists()


def test_a_full_disk_warns_once_and_leaves_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = KernelCache(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(CacheWarning, match=r"cannot write the kernel cache .*No space left on device.*ATOMR_FLASHATTN_CACHE_DIR"):
        assert not cache.put(KEY, RECORD, CUBIN, "source")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cache.put(KEY, RECORD, CUBIN, "source")
        assert cache.save_source(KEY, "source") is None
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_half_way_leaves_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = KernelCache(tmp_path)
    write = Path.write_bytes

    def full_after_the_source(path: Path, data: bytes) -> int:
        if data == CUBIN:
            write(path, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_after_the_source)
    with pytest.warns(CacheWarning):
        assert not cache.put(KEY, RECORD, CUBIN, "source")
    assert cache.get(KEY) is None
    assert not list(tmp_path.glob(".new-*"))


def test_a_folder_that_may_not_be_written_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    cache = KernelCache(tmp_path / "readonly")
    with cache.single_flight(KEY), pytest.warns(CacheWarning, match="Permission denied"):
        assert not cache.put(KEY, RECORD, CUBIN, "source")
    with cache.single_flight(KEY), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cache.put(KEY, RECORD, CUBIN, "source")


def test_an_unreadable_entry_warns_once_and_is_a_miss(tmp_path: Path):
    cache = filled(tmp_path)
    part(cache, ".json").unlink()
    part(cache, ".json").mkdir()  # reading it fails for every user, root included
    with pytest.warns(CacheWarning, match="cannot read the kernel cache"):
        assert cache.get(KEY) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get(KEY) is None
    with pytest.raises(CacheError, match="cannot read"):
        cache.verify()
    with pytest.raises(CacheError, match="cannot remove"):
        cache.clear()


def test_a_cache_that_is_a_file_is_a_miss_and_an_error_when_asked(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("")
    cache = KernelCache(path)
    with pytest.warns(CacheWarning):
        assert cache.get(KEY) is None
    with pytest.raises(CacheError, match="cannot read the kernel cache"):
        cache.list()


def test_readonly_reads_and_never_writes(tmp_path: Path):
    filled(tmp_path)
    cache = KernelCache(tmp_path, readonly=True)
    before = sorted(tmp_path.rglob("*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get(KEY) is not None
        with cache.single_flight(KEY):
            assert not cache.put(KEY, RECORD, b"other", "other")
        assert cache.save_source(KEY, "other") is None
    assert sorted(tmp_path.rglob("*")) == before


def test_strict_raises_where_others_warn(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot write the kernel cache"):
        KernelCache(tmp_path / "file", strict=True).put(KEY, RECORD, CUBIN, "source")
    with pytest.raises(CacheError, match="cannot read the kernel cache"):
        KernelCache(tmp_path / "file", strict=True).get(KEY)


def test_names_longer_than_a_file_name_are_cut(tmp_path: Path):
    cache = KernelCache(tmp_path)
    key = CacheKey("n" * 400, "ef" * 32)
    assert cache.put(key, replace(RECORD, name=key.name, key=key.digest), CUBIN, "source")
    assert cache.get(key) is not None


def test_readers_never_see_half_an_entry_while_it_is_replaced(tmp_path: Path):
    cache = filled(tmp_path)
    bodies = [b"\x7fELF" + bytes([n]) * 200_000 for n in range(2)]
    stop = threading.Event()

    def rewrite() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            cache.put(KEY, RECORD, bodies[n % 2], "source")

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(300):
            entry = cache.get(KEY)
            assert entry is None or entry.cubin in (*bodies, CUBIN)
    finally:
        stop.set()
        writer.join()


def test_single_flight_lets_one_in_at_a_time_and_other_keys_pass(tmp_path: Path):
    cache, inside, most = KernelCache(tmp_path), [0], [0]

    def work() -> None:
        with cache.single_flight(KEY):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            with cache.single_flight(CacheKey("other", "cd" * 32)):
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
