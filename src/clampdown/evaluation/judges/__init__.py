"""Judges: each gives a reply one of five verdicts, under a name that stands in every record."""
