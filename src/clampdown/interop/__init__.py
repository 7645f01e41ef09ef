"""Other people's tools run our models, steered: lm-evaluation-harness and Inspect."""
