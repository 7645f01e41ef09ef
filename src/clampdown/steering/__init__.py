"""Steering: plans as data, operators as functions, hooks that apply them exactly and prove that they did."""
