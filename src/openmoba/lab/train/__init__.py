"""One training run: its settings checked, its steps, its records."""
