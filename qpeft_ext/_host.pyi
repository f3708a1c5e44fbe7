from collections.abc import Sequence

import numpy as np

def pack_ragged(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]: ...
