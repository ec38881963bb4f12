"""The models that are trained: loaded, widened, encoded with; a family a file."""
