"""Which platforms JAX is told, by what is installed and attached."""

import importlib.machinery
import pathlib
import subprocess
import sys

import jax
import pytest

from blocktx.parallel import backend


@pytest.fixture
def unchosen():
    """No platform in JAX's configuration, as in a new process."""
    chosen = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", chosen)


@pytest.mark.parametrize(
    ("installed", "attached", "platforms", "warning"),
    [
        ([], [], None, ""),
        (["libtpu"], [], "cpu", ""),
        (["libtpu"], ["tpu"], None, ""),
        ([], ["gpu"], None, "an NVIDIA GPU is idle"),
        (["libtpu"], ["gpu"], "cpu", ".[cuda13]"),
        (["libtpu", "jax_cuda12_plugin"], ["gpu"], "cuda,cpu", ""),
        (["libtpu", "jax_cuda12_plugin"], [], "cpu", ""),
        (["libtpu", "other"], [], None, ""),
        ([], ["tpu"], None, ".[tpu]"),
    ],
)
def test_platforms(installed, attached, platforms, warning, unchosen, monkeypatch, capsys):
    told = []
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(backend, "_installed", lambda name: name in installed)
    monkeypatch.setattr(backend, "has_other_plugins", lambda: "other" in installed)
    monkeypatch.setattr(backend, "has_tpu", lambda: "tpu" in attached)
    monkeypatch.setattr(backend, "has_nvidia_gpu", lambda: "gpu" in attached)
    monkeypatch.setattr(jax.config, "update", lambda name, value: told.append((name, value)))
    backend.choose_backend()
    assert told == ([("jax_platforms", platforms)] if platforms else [])
    printed = capsys.readouterr().err
    assert warning in printed
    assert bool(printed) == bool(warning)


@pytest.mark.parametrize(
    ("plugins", "other"), [([], False), (["xla_cuda13"], False), (["xla_cuda13", "metal"], True)]
)
def test_plugins_of_other_vendors(plugins, other, tmp_path, monkeypatch):
    for name in plugins:
        (tmp_path / "jax_plugins" / name).mkdir(parents=True)
        (tmp_path / "jax_plugins" / name / "__init__.py").touch()
    found = importlib.machinery.ModuleSpec("jax_plugins", None)
    found.submodule_search_locations = [str(tmp_path / "jax_plugins")]
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: found)
    assert backend.has_other_plugins() == other


def test_what_the_user_chose_is_kept(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("changed"))
    backend.choose_backend()


def test_every_command_chooses():
    root = pathlib.Path(backend.__file__).parents[2]
    programs = [*root.glob("launch/*.py"), *root.glob("blocktx/**/__main__.py")]
    assert len(programs) > 15
    for path in programs:
        if path.name == "draw_readme.py":  # does not compute
            continue
        code = path.read_text()
        assert "command_line.run(" in code or "choose_backend()" in code, path


def test_a_command_is_silent_with_libtpu_and_without_a_tpu():
    pytest.importorskip("libtpu", reason="the noise is libtpu's")
    if backend.has_tpu():
        pytest.skip("has a TPU, or a network card of Google's")
    code = (
        "from blocktx.parallel.backend import choose_backend as f; f(); import jax; jax.devices()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="."
    )
    assert done.stderr == ""
