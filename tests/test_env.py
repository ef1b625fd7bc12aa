from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from atomr_accel_flashattn import env
from atomr_accel_flashattn.env import Settings, settings
from atomr_accel_flashattn.errors import ConstructionError, SettingsWarning

ENVIRON = {"HOME": "/home/somebody", "XDG_CACHE_HOME": "/caches"}


def test_defaults():
    assert Settings.from_environ(ENVIRON) == Settings(cache_dir=Path("/caches/atomr-accel-flashattn"))


def test_every_variable_is_read():
    given = {
        "BACKEND": "CPU",
        "CACHE_DIR": "/kernels",
        "CACHE_READONLY": "1",
        "DISABLE_CACHE": "yes",
        "DISABLE_TUNED": "1",
        "SAVE_SOURCE": "~/sources",
        "RECORD_KERNELS": "~/kernels.jsonl",
        "COMMIT": "1234abc",
        "DEBUG": "On",
    }
    assert Settings.from_environ({**ENVIRON, **{env.PREFIX + name: value for name, value in given.items()}}) == Settings(
        backend="cpu",
        cache_dir=Path("/kernels"),
        cache_readonly=True,
        cache_disabled=True,
        tuned_tiles_disabled=True,
        save_source=Path("~/sources").expanduser(),
        record_kernels=Path("~/kernels.jsonl").expanduser(),
        commit="1234abc",
        debug=True,
    )
    assert len(given) == len(fields(Settings))
    documented = re.findall(rf"``({env.PREFIX}[A-Z_]+)``", env.__doc__ or "")
    assert sorted(documented) == sorted(env.PREFIX + name for name in given)
    assert dict(env.VARIABLES).keys() == {field.name for field in fields(Settings)}
    assert sorted(env.VARIABLES.values()) == sorted(documented)


def test_empty_values_count_as_unset():
    assert Settings.from_environ({**ENVIRON, "ATOMR_FLASHATTN_DEBUG": "", "ATOMR_FLASHATTN_BACKEND": " "}) == Settings.from_environ(ENVIRON)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("BACKEND", "tpu", "ATOMR_FLASHATTN_BACKEND='tpu': allowed are auto, cpu, gpu"),
        ("DEBUG", "maybe", "ATOMR_FLASHATTN_DEBUG='maybe': allowed are 1, on, true, yes and 0, false, no, off"),
    ],
)
def test_other_values_are_refused(name: str, value: str, message: str):
    with pytest.raises(ConstructionError, match=re.escape(message)):
        Settings.from_environ({env.PREFIX + name: value})


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert Settings.from_environ({}).cache_dir is None


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch):
    settings.cache_clear()
    first = settings()
    monkeypatch.setenv("ATOMR_FLASHATTN_BACKEND", "cpu" if first.backend != "cpu" else "gpu")
    assert settings() is first
    settings.cache_clear()
    assert settings().backend != first.backend
    monkeypatch.undo()
    settings.cache_clear()


def test_an_unknown_variable_is_a_warning_that_names_the_nearest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATOMR_FLASHATTN_CACHEDIR", "/kernels")
    settings.cache_clear()
    with pytest.warns(SettingsWarning, match="CACHEDIR: no such setting.* nearest one is ATOMR_FLASHATTN_CACHE_DIR") as told:
        settings()
    settings()  # told once: warnings are errors in these tests
    assert len(told) == 1
    monkeypatch.undo()
    settings.cache_clear()


@pytest.mark.filterwarnings("error")
def test_variables_of_the_tests_and_of_others_are_no_warning():
    Settings.from_environ({**ENVIRON, "ATOMR_FLASHATTN_TEST_RECORD": "x.json", "ATOMR_OTHER": "1", "_ATOMR_FLASHATTN_COMPLETE": "x"})
