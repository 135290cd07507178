"""Everything that a person looks at: grids, pages, curves.

grids.py imports dataset; the rest imports inference too.  training, metrics and the commands may import it.
"""
