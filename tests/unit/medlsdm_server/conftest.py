from __future__ import annotations

from pathlib import Path

import pytest

from medlsdm_server.authority import create_certificates
from medlsdm_server.home import ServerHome, ServerSettings


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    home, settings = ServerHome(tmp_path / "coordinator"), ServerSettings(hosts=("localhost",), port=8443)
    home.create(settings)
    create_certificates(home, settings)
    return home
