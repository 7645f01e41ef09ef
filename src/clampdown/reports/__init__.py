"""What a run showed, for people: one offline HTML file and tables for the terminal. Reads files only; no torch."""
