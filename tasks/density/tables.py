"""Real tables that scikit-learn ships, split for training and test."""

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.model_selection import ShuffleSplit

from tasks.errors import InputError

TABLES = {
    "wine": load_wine,
    "breast_cancer": load_breast_cancer,
    "diabetes": load_diabetes,
}
TEST_FRACTION = 0.2


def split_table(name: str, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Return training and test rows, standardised by mean and spread of the first.

    A column of two values has no density: the sex of diabetes is left out.

    Args:
        name: One of `TABLES`.
        split: Number of the random split, which holds back 20 % of the rows.

    Raises:
        InputError: If there is no such table.
    """
    if name not in TABLES:
        raise InputError(f"there is no table {name!r}; known: {', '.join(TABLES)}.")
    rows = TABLES[name](return_X_y=True)[0]
    continuous = [len(np.unique(column)) > 2 for column in rows.T]
    rows = rows[:, continuous]
    shuffle = ShuffleSplit(1, test_size=TEST_FRACTION, random_state=split)
    train, test = next(shuffle.split(rows))
    mean, scale = rows[train].mean(0), rows[train].std(0)
    return (rows[train] - mean) / scale, (rows[test] - mean) / scale
