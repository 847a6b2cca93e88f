"""Fixtures: real servers and clients as programs, each test in a folder of its own."""

import os
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]  # the three files, and harness

from harness import Lab  # noqa: E402


@pytest.fixture
def lab(tmp_path):
    """Starts servers, clients and commands; whatever is left of them ends with the test."""
    with Lab(str(tmp_path)) as lab:
        yield lab
