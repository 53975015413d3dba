"""Launchers of the generated C++ kernels, on the layout `extent`; each file is built once by the machine's compiler."""
