"""1,797 real handwritten digits of 8x8 pixels that come with scikit-learn (UCI, test part of optdigits)."""

import torch

from pykd.data.memory import InMemory

# Of the training part, for pixels in [0, 1].
NORMALIZE = ((0.3054,), (0.3753,))


def read() -> tuple[InMemory, InMemory, tuple[str, ...]]:
    """Training part, test part, class names. The last fifth of every class, in the set's order, is the test part.

    The set is ordered by writer, so that a test digit is mostly from a hand that the training part has not seen.
    """
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.from_numpy(target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        rows = (labels == label).nonzero().flatten()
        is_test[rows[-(len(rows) // 5) :]] = True
    return (
        InMemory(images[~is_test], labels[~is_test], NORMALIZE),
        InMemory(images[is_test], labels[is_test], NORMALIZE),
        tuple("0123456789"),
    )
