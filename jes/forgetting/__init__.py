"""The forgetting study: many runs, their table and their figures."""
