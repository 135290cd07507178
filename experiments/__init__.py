"""Programs that measure or compare.  Run one as python -m experiments.NAME.
"""
