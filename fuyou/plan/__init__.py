"""Cost model and planner: pure functions on numbers."""
