"""What the tests of in-place functions share."""

import numpy as np
import pytest

X = np.arange(12, dtype=np.float32)
leaks_of_errors = pytest.mark.leaks_allowed(
    "the checker reports tracers in the traceback of the expected error"
)
