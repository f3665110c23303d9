"""Studies: methods x seeds on one grid, and what each paper measures."""
