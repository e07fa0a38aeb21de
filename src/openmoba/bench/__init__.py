"""Benchmarks of the attention operation against dense and sparse peers; torch alone is enough to time."""
