import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `tiny` is shared by the tests of this folder and its subprocesses
