"""Sparse autoencoders: the maths of each architecture, one reader per file format, a catalogue of releases."""
