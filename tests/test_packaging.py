"""What pyproject.toml ships equals what the folders hold."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("graph", "passes", "export", "runtime")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_is_a_package_of_the_wheel():
    """A nested folder that is missing from the list imports in an editable install and is absent from the wheel."""
    found = {"foveate"}
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".yaml", ".html", ".jinja") and "__pycache__" not in file.parts:
                found.add("foveate." + ".".join(file.parent.relative_to(ROOT).parts))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_data_files_are_declared():
    declared = PROJECT["tool"]["setuptools"]["package-data"]
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix != ".py" and "__pycache__" not in file.parts:
                package = "foveate." + ".".join(file.parent.relative_to(ROOT).parts)
                assert any(file.match(pattern) for pattern in declared.get(package, [])), f"{file.relative_to(ROOT)} would not be in the wheel"


def test_the_four_links_point_at_the_folders():
    for folder in FOLDERS:
        link = ROOT / "foveate" / folder
        assert link.is_symlink() and link.resolve() == ROOT / folder
        assert (ROOT / folder / "__init__.py").is_file()


def test_the_version_is_said_once():
    import foveate

    assert foveate.__version__ == PROJECT["project"]["version"]


def test_pinned_versions_are_inside_the_declared_ranges():
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["rtx"], *extras["dev"]]:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pins[name]), f"constraints.txt pins {name} {pins[name]}, pyproject.toml asks for {requirement.specifier}"
