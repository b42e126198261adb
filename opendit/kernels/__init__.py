"""Fused kernels. Each file holds one: its reference, its Triton kernels and its public function."""
