"""Terms of a response surface of second order."""

import pytest
import torch

from sbi_jeffreys.response_surface import second_order_terms


def test_squares_and_products_follow_the_parameters():
    z = torch.tensor([[2.0, 3.0, -5.0]]).repeat(90, 1)
    expected = [2.0, 3.0, -5.0, 4.0, 6.0, -10.0, 9.0, -15.0, 25.0]
    assert second_order_terms(z)[17].tolist() == expected


@pytest.mark.parametrize(
    ("num", "num_parameters", "expected"),
    [
        (89, 3, 3),  # ten simulations for every term
        (90, 3, 9),
        (10_000, 20, 230),
        (10_000, 21, 21),  # too many products
    ],
)
def test_there_are_no_products_of_few_simulations(num, num_parameters, expected):
    assert second_order_terms(torch.randn(num, num_parameters)).shape[1] == expected
