"""Scripts that make what is kept under assets/: the tiny base models."""
