"""Knowledge of models and of the installed transformers; no other folder names internals."""
