"""Sparse weights as compressed blocks, and the coding of their indices; numpy alone, no torch.

>>> import numpy as np
>>> SparseWeight(np.eye(3, dtype=np.float32)).nnz
3
"""

from pykd.sparse.weight import Packed, SparseWeight

__all__ = ["Packed", "SparseWeight"]
