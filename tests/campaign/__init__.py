"""Reliability campaigns: random cases by the thousand, each made from a seed and its number."""
