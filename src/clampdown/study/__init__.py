"""The experiment itself: find, choose on validation prompts, sweep, control, gate, and read the test prompts once."""
