"""Fixtures for all tests. Nothing reaches a network: the Hub is `hub_server.HubServer`, on a port of this process."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_server import HubServer, hub_environment

# huggingface_hub reads its settings once, at import. Each xdist worker imports this file, so each has its own Hub.
assert "huggingface_hub" not in sys.modules, "huggingface_hub was imported before its settings were made"
_HUB = HubServer()
_HOME = tempfile.mkdtemp(prefix="mgfc-tests-")
_SHARED = Path(__file__).resolve().parents[2] / "shared"
_ENVIRONMENT = hub_environment(_HUB.endpoint, _HOME)
os.environ.clear()
os.environ.update(_ENVIRONMENT)

torch.set_num_threads(1)  # tiny models gain nothing from more, and workers share the cores


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Finds data that lies beside the checkout, in `../shared`. Without it a test is skipped, and fails in CI."""

    def find(name: str) -> Path:
        path = _SHARED / name
        if not path.exists():
            message = f"{path} is missing"
            pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
        return path

    return find


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub and a cold client cache. The client's waits before retries are listed in `hub.sleeps`, not slept."""
    _HUB.reset()
    cache = str(tmp_path_factory.mktemp("hub_cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
    monkeypatch.setenv("HF_HUB_CACHE", cache)  # for subprocesses
    clock = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: _HUB.sleeps.append(seconds)})
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    monkeypatch.setattr("huggingface_hub.file_download.time", clock)
    yield _HUB
    bugs = _HUB.bugs
    _HUB.reset()
    assert not bugs, "\n".join(bugs)


@pytest.fixture
def logged_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The same, for a user who may write: calls need no `token=`."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


@pytest.fixture
def offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_OFFLINE=1 does, without a new process."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
