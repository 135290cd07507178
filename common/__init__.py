"""Code that the whole project uses: the command line, files, progress, devices, seeds.

Imports torch and the standard library only; anything may import it.
"""
