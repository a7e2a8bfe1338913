"""The modules of this folder import each other, and benchmarks/faults.py imports them: its folder is on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
