"""Kernels as factors. The schemes are registered here, in the order in which forms that compute
the same are preferred, whichever module is imported first."""

from importlib import import_module

for _scheme in ("separable", "channel", "matrix", "tucker"):
    import_module(f"{__name__}.{_scheme}")
