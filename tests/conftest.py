"""Makes ``tests`` importable for all test folders: ``from tiny import write_tiny``."""
