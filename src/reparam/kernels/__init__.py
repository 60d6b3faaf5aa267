"""Ops registered with `torch.library`, their torch references, and compiled kernels that must agree with those."""
