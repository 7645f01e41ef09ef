"""The command line: the composition root, where packages meet. Nothing heavy is imported until a command runs.

`app.py` holds what commands share, one module per family of commands holds their options, `main.py` puts them together.
"""
