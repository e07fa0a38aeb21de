"""MoBA on CUDA through Triton: route (pool, gate), plan (invert the choice), forward, backward."""
