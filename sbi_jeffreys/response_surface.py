"""Terms of a response surface of second order in the parameters.

Source: G. E. P. Box and K. B. Wilson, "On the Experimental Attainment of Optimum
Conditions", Journal of the Royal Statistical Society B 13, 1951.
"""

import torch
from torch import Tensor

# Simulations for every term, which may be fitted to half of them.
SIMULATIONS_PER_TERM = 10
# With more parameters than twenty their products are too many to be quick.
MAX_TERMS = 230


def second_order_terms(z: Tensor) -> Tensor:
    """Return parameters, and squares and products where there are simulations enough.

    Args:
        z: Standardised parameters of shape `(num_simulations, num_parameters)`.

    Returns:
        Of shape `(num_simulations, num_terms)`.
    """
    num, num_parameters = z.shape
    first, second = torch.triu_indices(num_parameters, num_parameters, device=z.device)
    num_terms = num_parameters + len(first)
    if num_terms > min(num // SIMULATIONS_PER_TERM, MAX_TERMS):
        return z
    return torch.cat((z, z[:, first] * z[:, second]), 1)
