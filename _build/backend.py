"""PEP 517 backend: setuptools', except that torch is asked for only where the target environment has none.

With torch in ``build-system.requires`` pip would download a second torch (gigabytes, perhaps of another CUDA) for every
build. Without it anywhere, a first ``pip install`` into an empty environment could not build. Hence this file.
"""

from find_torch import find_torch
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that are not changed here


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + needed()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + needed()


def needed() -> list[str]:
    return [] if find_torch() else ["torch>=2.10"]
