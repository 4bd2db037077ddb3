"""A round's program starts on every site in every round: it loads what it needs and no more."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("heavy", ["torch", "scipy", "nibabel", "pydicom", "medlsdm.sharing.gate"])
def test_what_training_does_not_need_is_not_loaded_before_it(heavy):
    code = f"import sys, medlsdm_node.clientapp; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
