"""What a kernel can be: plans, specs, the eager reference, the CPU path, Triton templates.

Import the modules by name; this file stays empty so that plans can be read without torch.
"""
