"""Show a scored archive in a browser. Runs until SIGTERM or Ctrl-C.

On this machine:
    python jobs/view.py scores
On a machine that reads the store, with a token (`ray job submit` would start it on a cluster's head):
    BCD_API_TOKEN=TOKEN python jobs/view.py s3://bucket/scores --host 0.0.0.0
"""

from bcd import cli

if __name__ == "__main__":
    cli.main("view", __doc__)
