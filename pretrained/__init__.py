"""Networks that come trained, and their files: autoencoder, T5, tokenizers, safetensors, published names.

Imports `common` and `model.py`; `checkpoint.py` and whatever stands above it may import it.
"""
