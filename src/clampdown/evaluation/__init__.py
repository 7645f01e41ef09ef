"""Measuring: suites of prompts under arms, judged, counted, and resumable."""
