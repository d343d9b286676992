"""The model and the transformers that are installed: the only folder that names their internals."""
