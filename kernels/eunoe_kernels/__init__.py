"""Kernels: one file a family, in this order: public function (validates, dispatches), PyTorch reference (the truth),
fast CPU path, Triton kernel.
"""
