"""The model repeats what a cache holds back, which marks each token with the attention it gets."""
