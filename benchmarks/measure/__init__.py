"""How everything is timed, and the result files."""
