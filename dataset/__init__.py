"""Sources of images with texts, and what is computed from them before training.

Imports common, pretrained and checkpoint.py; data.py and whatever stands above it may import it.
"""
