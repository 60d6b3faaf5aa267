"""Configurations of other tools, read as ones of reparam: one file for each tool."""
