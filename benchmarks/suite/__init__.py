"""`make gpu`."""
