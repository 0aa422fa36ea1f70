"""Times each op."""
