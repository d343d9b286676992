"""Repetition of a held text by the model: the attention that a token gets is its mark (KVzip)."""
