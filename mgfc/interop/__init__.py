"""Formats and libraries of others: adapters that Rein published, and `peft`'s own functions."""
