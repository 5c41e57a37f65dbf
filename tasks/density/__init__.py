"""The paper's own experiments: densities of samples, without a simulator.

After O. Ben-Dov and L. F. O. Chamon, "Adaptive Symmetrization of the KL Divergence"
(arXiv:2511.11159). ``python -m tasks density`` and ``python -m tasks images`` run them.
"""
