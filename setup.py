"""The packages of the wheel; everything else about it stands in pyproject.toml."""

from setuptools import find_packages, setup

# configs/ stays at the top of the repository and is installed as tapct/configs, so that
# `tapct train smoke` works without a copy of the repository.
setup(
    packages=[*find_packages(include=["tapct*"]), "tapct.configs", "tapct.configs.data"],
    package_dir={"tapct.configs": "configs", "tapct.configs.data": "configs/data"},
)
