"""Evolution strategies as pure functions, apart from any model."""
