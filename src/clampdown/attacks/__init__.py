"""Attacks on a plan by somebody who knows it: with text alone, with gradients, and through the activations."""
