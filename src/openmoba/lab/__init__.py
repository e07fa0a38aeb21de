"""The laboratory: data, training, evaluation, studies, fits and figures. Import its modules by name."""
