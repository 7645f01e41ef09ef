"""What each command does, one module per command; `clampdown.cli` turns options into calls of these."""
