"""Regions become one layer each, and are compared with what they replace."""
