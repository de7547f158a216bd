"""Seeds, hypothesis profiles and the one check that needs every test: no Amaranth component left unelaborated."""

import os
from zlib import crc32

from hypothesis import settings
import numpy as np
import pytest

settings.register_profile("test", derandomize=True, deadline=None)
#: `make soak`: new examples at every run, more of them.
settings.register_profile("soak", deadline=None, max_examples=500)
settings.load_profile("soak" if os.environ.get("SUMMAND_SOAK") else "test")


def pytest_addoption(parser):
    """Adds ``--seed``."""
    parser.addoption("--seed", type=int, default=0, help="seed of the random stimulus, mixed with each test's name")


def test_seed(config, nodeid):
    """Seed of one test: the ``--seed`` option mixed with the test's name, so that no two tests share stimulus."""
    return crc32(nodeid.encode()) ^ (config.getoption("--seed") * 0x9E3779B1 & 0xFFFFFFFF)


@pytest.fixture
def seed(request):
    """Seed of this test, see `test_seed`."""
    return test_seed(request.config, request.node.nodeid)


@pytest.fixture
def rng(seed):
    """NumPy generator of this test."""
    return np.random.default_rng(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test says how to repeat it with the same stimulus."""
    report = yield
    if report.when == "call" and report.failed:
        number = item.config.getoption("--seed")
        report.sections.append(("repeat with", f"pytest --seed {number} '{item.nodeid}'"))
    return report
