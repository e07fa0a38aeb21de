"""Many runs compared: recipes, their work, and what may be said of the outcome."""
