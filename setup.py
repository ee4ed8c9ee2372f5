"Everything that settings.ini says, handed to setuptools; pyproject.toml holds the rest."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

cp = ConfigParser(interpolation=None)
cp.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = cp["DEFAULT"]


def reqs(key):
    "One requirement a word, its marker included"
    return cfg[key].split()


setup(
    description=cfg["description"],
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    project_urls={"Repository": cfg["git_url"], "Issues": cfg["git_url"] + "/issues"},
    python_requires=f">={cfg['min_python']}",
    install_requires=reqs("requirements"),
    extras_require={k: reqs(f"{k}_requirements") for k in ("dev", "gpu", "unsloth", "notebook")},
)
