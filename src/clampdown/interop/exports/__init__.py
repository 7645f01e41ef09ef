"""Plans in other tools' formats, and plans made from other tools' files: one file and one row per format."""
