"""The main job from Python, by short names: `clampdown.face` offers them, `import clampdown as cd` brings them."""
