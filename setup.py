"""Everything is declared in pyproject.toml; this file is where an optional CUDA extension would be added."""

from setuptools import setup

setup()
