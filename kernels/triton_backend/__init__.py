"""Launchers of the generated Triton kernels: one file a kernel, none of them reads a device value back."""
