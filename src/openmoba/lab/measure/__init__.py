"""What a model is worth and what it costs: losses with intervals, needles, generated text, compute."""
