"""Errors that are handled apart from other bad input."""

from __future__ import annotations


class DivergenceError(ValueError):
    """A run whose loss or gradient is no number any more: it would be so again, others need not wait for it."""
