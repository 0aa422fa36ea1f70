"""Tables, plots and comparisons of result files."""
