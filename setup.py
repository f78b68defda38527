"""Maps the folder kernels/ to the import name vit_fast.kernels; everything else is in pyproject.toml.

A top-level package called `kernels` would overwrite the distribution of that name that transformers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vit_fast", "vit_fast.*"]), "vit_fast.kernels"],
    package_dir={"vit_fast": "vit_fast", "vit_fast.kernels": "kernels"},
)
