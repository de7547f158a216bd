"""Campaigns for hours: planted faults, random networks on random configurations, new seeds."""
import os
from pathlib import Path
import sys

_ROOT = Path(__file__).resolve().parent.parent.parent
#: How a printed command names the interpreter: from the root of the project where it lies inside.
PYTHON = os.path.relpath(sys.executable, _ROOT) if _ROOT in Path(sys.executable).parents else "python"
