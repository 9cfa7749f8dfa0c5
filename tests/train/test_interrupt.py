"""What asks a run to stop: signals, and what a Google VM is told about its end."""

import os
import pathlib
import signal
import time

import pytest

from blocktx.parallel import google_vm
from blocktx.train.interrupt import StopSignals
from tests.helpers.metadata_server import metadata_server

QUIET = {"maintenance-event": "NONE", "preempted": "FALSE"}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(google_vm, "_PRODUCT_NAME", pathlib.Path("/nowhere"))
    # A shell starts what it puts in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_for_stop(stop, seconds=5.0):
    end = time.monotonic() + seconds
    while stop.signal is None and time.monotonic() < end:
        time.sleep(0.01)
    return stop.signal


def test_sigterm_again_changes_nothing(capfd):
    """Systemd sends one to every process, and a parent passes on its own."""
    with StopSignals() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert capfd.readouterr().err.count("stopping after this step") == 1


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_that_stops_at_once(first):
    with StopSignals() as stop:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == first


def test_sigterm_after_ctrl_c_does_not_cut_the_save():
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGINT


@pytest.mark.parametrize(
    "notice", [{"preempted": "TRUE"}, {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}]
)
def test_notice_counts_as_sigterm(notice, monkeypatch, capfd):
    ((path, value),) = notice.items()
    with metadata_server(QUIET | notice) as host:
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        with StopSignals() as stop:
            assert wait_for_stop(stop) == signal.SIGTERM
            signal.raise_signal(signal.SIGTERM)  # the machine shuts down while the run is saved
    err = capfd.readouterr().err
    assert err.startswith(f"Google Cloud says {path}={value}: stopping after this step")


@pytest.mark.parametrize("told", [QUIET, {"maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}, {}])
def test_no_notice(told, monkeypatch):
    with metadata_server(told) as host:
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        with StopSignals() as stop:
            assert wait_for_stop(stop, 0.2) is None


def test_notice_that_comes_later(monkeypatch):
    told = dict(QUIET)
    with metadata_server(told) as host:
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        with StopSignals() as stop:
            assert wait_for_stop(stop, 0.1) is None
            told["preempted"] = "TRUE"
            assert wait_for_stop(stop) == signal.SIGTERM


def test_server_that_comes_late(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    with StopSignals() as stop:
        assert wait_for_stop(stop, 0.1) is None
        with metadata_server(QUIET | {"preempted": "TRUE"}) as host:
            monkeypatch.setenv("GCE_METADATA_HOST", host)
            assert wait_for_stop(stop) == signal.SIGTERM


def test_elsewhere_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(os, "write", lambda *_: pytest.fail("something was noted"))
    begin = time.monotonic()
    with StopSignals() as stop:
        assert stop.signal is None
    assert time.monotonic() - begin < 0.1
    assert not google_vm.is_google_vm()


def test_google_vm_by_its_product_name(tmp_path, monkeypatch):
    (tmp_path / "name").write_text("Google Compute Engine\n")
    monkeypatch.setattr(google_vm, "_PRODUCT_NAME", tmp_path / "name")
    assert google_vm.is_google_vm()
