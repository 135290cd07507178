"""Pretrained networks and their files: autoencoder, T5, tokenizers, safetensors, published layouts.

Imports `common` and `model.py`; `checkpoint.py` and the modules above it may import it.
"""
