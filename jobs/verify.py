"""Verify that a model bundle is as it was signed.

On this machine:
    python jobs/verify.py runs/train/model --key signing.pub
On a cluster:
    ray job submit --working-dir . -- python jobs/verify.py s3://bucket/model --key signing.pub
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("verify", __doc__)
