"""Where real data lie: the folder that the environment variable SUMMAND_DATA names, else ``../shared/data``."""
import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("SUMMAND_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def real_data(*names):
    """The folder (or file) of a data set, ``names`` below `FOLDER`; skips the test, saying so, where it is absent."""
    path = FOLDER.joinpath(*names)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(names)} in ../shared/data or SUMMAND_DATA")
    return path
