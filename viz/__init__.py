"""Show results: grids of samples, pages of a sampling run, curves of a training run.

grids.py does not import inference, because inference imports grids.py; the other files may.
training, metrics and the commands may import viz.
"""
