"""Sources of images with texts, and the results that are computed from them before training.

Imports common, pretrained and checkpoint.py; data.py and the modules above it may import it.
"""
