"""A pod cannot write to its root file system: what the jobs write is below /tmp, in memory, or in storage."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.cluster import PATIENCE_S, ROOT

pytestmark = [pytest.mark.ray, pytest.mark.trial]
# In a mount namespace of its own. Without capabilities root may write no more than others.
READ_ONLY = """
set -e
mount --make-rprivate /
mount -o remount,bind,ro /
mount -t tmpfs -o mode=1777 tmpfs /tmp
! touch "$PWD/probe" 2> /dev/null
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


def test_all_jobs_run_where_only_tmp_can_be_written():
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs the right to make mount namespaces")
    dockerfile = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
    set_there = re.search(r"^ENV ((?:.*\\\n)*.*)$", dockerfile, re.M)[1].replace("\\\n", "")
    variables = dict(word.split("=") for word in shlex.split(set_there))
    assert variables.pop("RAY_AUTH_MODE") == "token"
    demo = (sys.executable, "jobs/demo.py", "--patients-per-subtype", "3", "--epochs", "1")
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", READ_ONLY, "bash", *demo, "--output", "/tmp/demo"],
        cwd=ROOT,
        env=os.environ | variables | {"HOME": "/nonexistent", "TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "summary: /tmp/demo/scores/summary.json" in done.stdout
    assert "Read-only file system" not in done.stdout + done.stderr
