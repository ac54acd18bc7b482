"""What a checkout contains."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_only_pictures_of_the_documentation_are_binary():
    """No wheel, data or weights: what was fetched for a trial is not of the project."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [Path(name) for name in listed.split("\0") if name]
    assert len(tracked) > 100
    pictures = {path for path in tracked if path.parent == Path("docs") and path.suffix == ".png"}
    binary = {path for path in tracked if (ROOT / path).exists() and b"\0" in (ROOT / path).read_bytes()}
    assert not binary - pictures
