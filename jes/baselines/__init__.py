"""What evolution strategies are compared with."""
