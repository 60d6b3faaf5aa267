"""Device kernels behind the ops registered with `torch.library`; each names the torch reference it must agree with."""
