"""The command keeps compiled programs in the user's cache folder, says so once, and leaves the user's settings alone."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as cache

from polarjax.cli import main as command
from polarjax.cli.compile_cache import OFF, cache_folder, compile_cache


@pytest.fixture(autouse=True)
def nobody_configured_a_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    users = {"jax_compilation_cache_dir": None, "jax_enable_compilation_cache": True}
    before = {
        name: getattr(jax.config, name) for name in (*users, "jax_persistent_cache_min_compile_time_secs")
    }
    for name, value in users.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    cache.reset_cache()


def test_programs_are_kept_and_it_is_said_once(tmp_path, capsys):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    for i in range(2):
        with compile_cache():
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "polarjax" / "compiled")
            jax.block_until_ready(jax.jit(lambda x, i=i: x * 3.25 + i)(jnp.ones(7 + i)))
        assert jax.config.jax_compilation_cache_dir is None
        assert capsys.readouterr().err.count(str(tmp_path)) == (i == 0)
    assert len(list(cache_folder().glob("jit*"))) >= 2


def test_a_folder_that_cannot_be_made_is_one_line_and_work_goes_on(tmp_path, capsys):
    (tmp_path / "polarjax").write_text("in the way")
    with compile_cache():
        assert jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "Hint: " in line
    assert OFF in line
    assert str(tmp_path) in line


@pytest.mark.parametrize(
    "setting", [("jax_compilation_cache_dir", "mine"), ("jax_enable_compilation_cache", False)]
)
def test_the_users_settings_win(setting, tmp_path, capsys):
    jax.config.update(*setting)
    with compile_cache():
        assert getattr(jax.config, setting[0]) == setting[1]
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_it_can_be_turned_off(tmp_path):
    with compile_cache(wanted=False):
        assert jax.config.jax_compilation_cache_dir is None
    assert not list(tmp_path.iterdir())


def test_a_relative_cache_home_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder().is_relative_to(tmp_path)


@pytest.mark.parametrize("name", command.VERBS)
def test_verbs_that_compile_have_the_option(name):
    verb = command.VERBS[name]
    parameters = inspect.signature(command._command(verb)).parameters
    assert ("no_cache" in parameters) == verb.compiles == (name not in {"convert", "export", "inspect"})
