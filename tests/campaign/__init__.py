"""Reliability campaigns (fuzz tests): thousands of cases, each made from a seed and its number."""
