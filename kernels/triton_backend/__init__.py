"""Launchers of the generated Triton kernels: one file a kernel; nothing in a step reads a device value back."""
