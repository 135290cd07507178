"""Programs that measure or compare, run as python -m experiments.NAME; nothing imports them.
"""
